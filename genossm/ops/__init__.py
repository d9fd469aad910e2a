"""The operations that sequence models on DNA are made of: each with its plain reference beside it."""
