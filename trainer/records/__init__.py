"""What a run leaves for others: its manifest, its model card, its place on the hub, and how to repeat it."""
