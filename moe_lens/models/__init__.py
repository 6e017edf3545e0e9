"""Models: the only floor that knows transformers.

name -> `source` (files, early errors) -> `load` -> `Lens`
model -> `sites` (where the feed-forward parts are) -> `seam` and `dense` (taps and edits) -> `trace`
"""
