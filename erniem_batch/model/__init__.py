"""The ErnieM network: config, encoder, heads and model folders."""
