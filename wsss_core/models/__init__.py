"""The networks: trunks by name, the classifier with its context slot, the segmenter.

A trunk has five blocks, as the papers count them: block 1 ends at stride 2 or 4, block 5 at the
output stride. No module here knows where a context map comes from: the classifier asks a function
for it at the size it needs.
"""
