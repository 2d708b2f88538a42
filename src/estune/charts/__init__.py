"""Figures for people: charts on a page, charts as a picture, tables as text, numbers in words.

Imports errors and files. Begin with `chart.py`.
"""
