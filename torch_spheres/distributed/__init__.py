"""Several processes that share each batch: groups, failures, and sums in the tree over all."""
