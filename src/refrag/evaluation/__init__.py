"""Measuring: answers, retrieval, speed."""
