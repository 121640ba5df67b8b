"""Reports: run folders read back, plotted, and bound into one self-contained page.

`report.build.write_report` makes the page; importing this package is free.
"""
