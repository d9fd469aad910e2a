"""The ground floor of DNA: alphabet, tokenizers, intervals, genomes. Needs numpy alone until a file is opened."""
