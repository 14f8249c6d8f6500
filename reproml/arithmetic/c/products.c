/* Matrix products: dot.py has the method. */

#include "common.h"

/* Widen a row-major matrix to binary64; squared norms of its rows (by_row) or columns go to `norm`. */
VECTORISED
void reproml_widen(const float *restrict x, integer rows, integer columns, int by_row,
                   double *restrict wide, double *restrict norm) {
    if (!by_row)
        for (integer j = 0; j < columns; j++) norm[j] = 0;
    for (integer i = 0; i < rows; i++) {
        const float *restrict from = x + i * columns;
        double *restrict to = wide + i * columns;
        if (by_row) {
            double part[8] = {0}, sum = 0;
            integer j = 0;
            for (; j + 8 <= columns; j += 8)
                for (int t = 0; t < 8; t++) {
                    double d = from[j + t];
                    to[j + t] = d;
                    part[t] += d * d;
                }
            for (; j < columns; j++) {
                double d = from[j];
                to[j] = d;
                sum += d * d;
            }
            for (int t = 0; t < 8; t++) sum += part[t];
            norm[i] = sum;
        } else {
            for (integer j = 0; j < columns; j++) {
                double d = from[j];
                to[j] = d;
                norm[j] += d * d;
            }
        }
    }
}

/* out = round(c + bias), |c - exact| <= g * row[i] * column[j]; bias: null or one for each column.
   The test compares bit patterns, so that not even the sign of a zero comes from c. */
VECTORISED
integer reproml_round_product(const double *restrict c, integer rows, integer columns,
                              const double *restrict row, const double *restrict column,
                              const float *restrict bias, double g, float *restrict out,
                              integer *restrict failed) {
    integer count = 0;
    for (integer i = 0; i < rows; i++) {
        const double *restrict from = c + i * columns;
        float *restrict to = out + i * columns;
        double gi = g * row[i];
        int32_t differ = 0;
        for (integer j = 0; j < columns; j++) {
            double b = bias ? (double)bias[j] : 0.0;
            double x = from[j] + b;
            double e = gi * column[j] + g * fabs(b);
            float low = (float)(x - e), high = (float)(x + e);
            to[j] = high;
            differ |= bits(low) ^ bits(high);
        }
        if (differ)
            for (integer j = 0; j < columns; j++) {
                double b = bias ? (double)bias[j] : 0.0;
                double x = from[j] + b;
                double e = gi * column[j] + g * fabs(b);
                to[j] = (float)(x + e);
                if (bits((float)(x - e)) != bits(to[j])) failed[count++] = i * columns + j;
            }
    }
    return count;
}

