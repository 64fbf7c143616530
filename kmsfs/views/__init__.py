"""How the store is shown to other programs."""
