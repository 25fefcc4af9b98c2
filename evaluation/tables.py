"""The tables of a report, as CSV files."""
import csv
import os

import numpy as np


def write_table(folder, name, header, rows):
    """Writes a CSV file into a folder."""
    with open(os.path.join(folder, name), 'w', newline='', encoding='utf-8', errors='surrogateescape') as file:
        writer = csv.writer(file, lineterminator='\n')
        writer.writerow(header)
        writer.writerows(rows)


def digits(value):
    """A share with six decimals; empty where it is undefined."""
    return '' if np.isnan(value) else f'{value:.6f}'
