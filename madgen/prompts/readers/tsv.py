"""Tab-separated values with a header; otherwise the same as CSV."""

from functools import partial

from madgen.prompts.readers import csv

COLUMNS, COMMENTS, GZIP = csv.COLUMNS, csv.COMMENTS, csv.GZIP
read = partial(csv.read, delimiters=("\t",))
