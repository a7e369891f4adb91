"""The numbers that each paper's claims are judged by, taken from the Results of a run."""
