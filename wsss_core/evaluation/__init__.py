"""Numbers and pictures that say how good masks are; nothing in here ever feeds a later stage.

Pixel truth enters as arrays only. The definition of every score stands in docs/method.md.
"""
