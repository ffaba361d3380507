"""The revisions, in a line; none imports the tables of today."""
