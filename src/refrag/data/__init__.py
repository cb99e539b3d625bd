"""Rows of documents and of questions, read from files, folders, saved data sets and hub names: for training and for measuring."""
