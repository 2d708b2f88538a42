"""Figures for people: charts on a page, charts as a picture, tables as text.

Imports errors and files. Begin with `chart.py`.
"""
