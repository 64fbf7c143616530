"""Tests of kmsfs."""
