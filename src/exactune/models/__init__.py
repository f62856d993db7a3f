"""Models: load them, add adapters, name their parts, swap in the fast ones and prove them."""
