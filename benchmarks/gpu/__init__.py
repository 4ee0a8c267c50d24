"""One short visit to a GPU: what is there, is it right, how fast, does it train."""
