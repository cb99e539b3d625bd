"""The almanac, a closed invented world, and the tiny model that reads it."""
