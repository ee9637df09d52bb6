"""One module a stage: the only place where files meet numbers.

A stage is called with the whole settings tree, a workspace and the manifests it reads; it answers
with a manifest. Which settings it may look at is its own slice, and that slice is in its key.
"""
