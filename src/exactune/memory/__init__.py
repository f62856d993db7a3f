"""What is kept, recomputed, tiled or offloaded, and how many bytes that takes: predicted before a run, enforced during it.

`plan` chooses a policy for every layer from a model's `shape` and a budget; `terms` counts the bytes; `offload` is the host's side.
"""
