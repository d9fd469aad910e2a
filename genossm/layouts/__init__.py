"""Published layouts: one file a family says how its config values and tensors are named, beside ours."""
