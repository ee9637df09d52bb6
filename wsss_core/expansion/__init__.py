"""Seeds to pseudo-masks, one module a method, and the parts that methods share.

`method` says what a method is; `none`, `crf` and `irn` are methods. `boundary_labels`, `paths`,
`affinity` and `random_walk` are the steps of IRNet without its instance step (Ahn et al. 2019).
"""
