// The C interface of the CPU kernels: plain pointers, so that one library serves every PyTorch.
// kernels/distilfast_kernels/cpp.py holds the same declarations for ctypes.
#pragma once

#include <stdint.h>

// To be raised with every change of a structure or its meaning, here and in cpp.py.
#define DISTILFAST_ABI 4
#define DISTILFAST_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

enum distilfast_dtype { DISTILFAST_FP32, DISTILFAST_BF16, DISTILFAST_FP16 };
enum distilfast_divergence { DISTILFAST_NO_KD, DISTILFAST_FORWARD_KL, DISTILFAST_REVERSE_KL, DISTILFAST_JSD };
enum distilfast_level {
    DISTILFAST_PLAIN,
    DISTILFAST_AVX2,
    DISTILFAST_AVX512,
    DISTILFAST_AVX512BF16
};

// Rows of elements of one dtype, dense in a row.
typedef struct {
    void* data;
    int64_t stride;  // elements from row to row
    int64_t dtype;
} distilfast_matrix;

// What makes logits of a head's products x: softcap tanh(scale (x + bias) / softcap).
typedef struct {
    double scale, softcap;  // softcap 0: none
    const float* bias;      // (n_cols,), or null
} distilfast_head;

typedef struct {
    distilfast_matrix student, teacher;  // products of the heads below
    // The student's dtype, or 16 bits where the student is fp32; data null: none. It may lie in the
    // student's own memory: a row begins where the student's does, and what is written has been read.
    distilfast_matrix gradient;
    distilfast_head student_head, teacher_head;
    float* bias_gradient;        // (n_cols,), to add the gradient's sum over the rows to; or null
    const int64_t* labels;       // (n_rows,), or null
    const float* mask;           // (n_rows,) row weights, or null
    const float* kd_scale;       // (1,) or (n_rows,), by its stride of 0 or 1
    const float* ce_scale;
    int64_t kd_scale_stride, ce_scale_stride;
    float* rows;        // (4, n_rows): kd, ce, cos, mse
    float* statistics;  // (3, n_rows): entropy of student and teacher, agreement; or null
    int64_t n_rows, n_cols, n_padded, ignore_index, divergence;
    double temperature, kd_weight, ce_weight, cos_weight, mse_weight, beta;
} distilfast_distillation_args;

typedef struct {
    distilfast_matrix student, teacher;
    distilfast_matrix gradient;  // the student's dtype, or fp32; data null: none
    const float* mask;
    const float* scale;
    int64_t scale_stride;
    float* rows;  // (n_rows,), added to
    int64_t n_rows, n_cols;
    double share;  // of this layer in the mean
} distilfast_cosine_args;

typedef struct {
    const distilfast_matrix* teachers;
    const double* weights;  // summing to 1, none 0
    int64_t n_teachers;
    float* z;  // (n_rows, n_cols) by stride_z
    int64_t stride_z, n_rows, n_cols, mean;  // mean: arithmetic, else geometric
    double temperature;
} distilfast_ensemble_args;

typedef struct {
    distilfast_matrix gradient;
    const float* by;  // (1,) or (n_rows,), by its stride of 0 or 1
    int64_t by_stride, n_rows, n_cols;
} distilfast_scale_args;

typedef struct {
    float* total;  // (n_rows, n_cols) by stride_total; holds nothing yet unless begun
    distilfast_matrix share;
    int64_t stride_total, n_rows, n_cols, begun;
} distilfast_accumulate_args;

typedef struct {
    distilfast_matrix hidden, weight;  // (n_rows, depth), (n_cols, depth); bf16
    float* product;                    // (n_rows, n_cols) by stride_product
    const float* bias;                 // (n_cols,), or null
    int64_t stride_product, n_rows, n_cols, depth;
} distilfast_product_args;

// Differs where the structures above do: whoever calls has to have been made with the same.
DISTILFAST_API int64_t distilfast_abi(void);
// The best level that this machine runs.
DISTILFAST_API int distilfast_best_level(void);
// 0, or an errno. level: one that this machine runs; threads: how many to use.
DISTILFAST_API int distilfast_distillation(const distilfast_distillation_args*, int level, int threads);
DISTILFAST_API int distilfast_hidden_cosine(const distilfast_cosine_args*, int level, int threads);
DISTILFAST_API int distilfast_combine_teachers(const distilfast_ensemble_args*, int level, int threads);
DISTILFAST_API int distilfast_scale(const distilfast_scale_args*, int level, int threads);
DISTILFAST_API int distilfast_accumulate(const distilfast_accumulate_args*, int level, int threads);
// ENOSYS at a level without bf16 products.
DISTILFAST_API int distilfast_product(const distilfast_product_args*, int level, int threads);

#ifdef __cplusplus
}
#endif
