"""Tests: laws, golden vectors, faults, one end-to-end; the files mirror the tree."""
