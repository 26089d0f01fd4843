"""Inside the choice of an encoder: all layers and poolings of a pass, and what scores them."""
