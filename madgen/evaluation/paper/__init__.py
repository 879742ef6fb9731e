"""Tables and figures from one file each: datasets, their scores, and what is drawn of them."""
