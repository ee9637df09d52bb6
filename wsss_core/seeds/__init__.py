"""Seeds: class activation maps over scales and flips, normalised a class, kept at stride 4.

Source: irn step/make_cam.py.
"""
