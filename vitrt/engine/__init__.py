"""From prepared images to features on the device, behind vitrt/encoder.py."""
