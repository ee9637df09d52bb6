"""Seeds to pseudo-masks, one module a method; each maps (photo, scores) to a label map."""
