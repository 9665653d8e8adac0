"""The packed form of a base: how it is made from a checkpoint, and kept between starts."""
