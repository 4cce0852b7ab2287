"""Files of pictures: what they show, for training and for sampling alike, and letters on pictures."""
