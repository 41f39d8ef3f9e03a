"""The files of an output folder and their durability, behind vitrt/output.py."""
