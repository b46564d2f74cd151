"""What a name in the configuration means: an asset, a folder, or a model or data set of the hub."""
