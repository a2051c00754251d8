"""Pickles of values, read into trees and built from tables of known classes."""
