"""Sums of tensors in the fixed tree.

`partition` says which rows and leaves belong to whom, `tree_sum` adds tensors that are all there,
`streaming_sum` adds gradients while other shards still run. `distributed` and `training` use them.
"""
