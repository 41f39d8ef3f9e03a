"""Decoding and resizing, behind vitrt/image.py."""
