"""Photos, tags and truth: from a person's files to checked records and arrays.

`source` reads a data set (`voc`, `photos`), `check` says what is wrong with one, `scenes` draws
one; `images` opens pictures and masks, `truth` finds the masks that scores need, `transforms` makes
batches. Masks follow VOC: 0 is the background, 255 is ignored.
"""
