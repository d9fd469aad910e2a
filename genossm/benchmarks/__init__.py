"""What `genossm bench` measures: one file a topic, each with `comparisons(device)`; the folder is the list."""
