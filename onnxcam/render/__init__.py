"""Maps made visible: colours, overlays on the photo, figures side by side. Only NumPy and Pillow are used."""
