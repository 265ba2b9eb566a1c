"""Masks that users draw: image files, decoded as they are, and what their values, colours and alpha say of tissue."""
