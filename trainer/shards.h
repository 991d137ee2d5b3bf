// ShardLayout: the part of every flat buffer that each rank of a group owns (ZeRO).  Pure arithmetic.
//
//     flat buffer, 2 ranks     | row 0: unit | unit | row 1: unit | unit | last row: u | u |..  padding
//     owner                           0        1            0       1                0   1
//     shard of rank 0          | unit of row 0 | unit of row 1 | u of the last row |
//
// A flat buffer (trainer/flat_params.h) is cut into rows, each of one unit per rank: rank r owns unit r of every row.  So
// one message sums a row into its owners or gathers it, and rows are complete one by one in the backward pass.  The last
// row has a smaller unit and may reach beyond the flat buffer: the padding is zero.  The shards of all ranks have one
// size.  Units are whole chunks of GradNorm, so that the norm's partial sums are those of the whole buffer.
#pragma once
#include <vector>

#include "trainer/flat_params.h"

class ShardLayout {
  public:
    // n elements in rows of at most max_row elements, but of no less than one chunk per rank.
    ShardLayout(size_t n, int size, size_t max_row);

    size_t n() const { return n_; }
    size_t padded() const { return padded_; }               // end of the last row
    size_t shard_count() const { return padded_ / size_; }  // elements of a shard
    int n_rows() const { return int((padded_ + row_ - 1) / row_); }
    Range row(int i) const;              // of the padded flat buffer
    Range unit(int i, int rank) const;   // of the padded flat buffer
    Range in_shard(int i) const;         // where a shard has its unit of this row
    Range owned(int i, int rank) const;  // the unit without padding; may be empty
    size_t owned_count(int rank) const;  // of all rows: a shard without padding, which is its end
    int row_of(size_t element) const { return int(element / row_); }

    // The parameters that lie in the shard of a rank, or the pieces of them.  Each range is one of the shard.
    std::vector<FlatParam> pieces(const std::vector<FlatParam>& flat, int rank) const;

  private:
    size_t n_, size_, row_, padded_;
};
