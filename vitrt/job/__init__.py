"""`vitrt encode`: listing, decoding ahead, the device, writing behind, over one rank or many."""
