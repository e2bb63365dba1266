"""A ParNet on several devices, its streams side by side."""
