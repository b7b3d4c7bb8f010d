"""`data-pipeline import`: data in the files that people have, as a dataset in the Well's layout."""
