/* Optional native code for the slowest parts of the data loader: decoding and resizing a crop of a
 * JPEG into its slot of a batch (trainer/data/decode/decoder.py), and finding a sample's files in a
 * byte range of a tar archive (trainer/data/shards/tar.py).
 *
 * libjpeg-turbo decodes only the rows and columns of the crop, at a reduced scale if the crop is
 * much larger than the result. The antialiased resize consumes each row as it is decoded, so the
 * full image is never in memory. Corrupt or unusual data is not handled here: it is rejected, and
 * the caller falls back to Pillow.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <jpeglib.h>

#if !defined(LIBJPEG_TURBO_VERSION_NUMBER) || LIBJPEG_TURBO_VERSION_NUMBER < 2000000
#error "libjpeg-turbo >= 2.0 is needed"
#endif

/* The two hot loops are compiled for AVX2 and for the baseline; the dynamic linker selects the one
 * that the processor supports when the module is loaded. */
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(CONVOY_NO_CLONES)
#define CLONED __attribute__((target_clones("avx2", "default")))
#else
#define CLONED
#endif

#define CHANNELS 4       /* libjpeg-turbo writes RGBX: a pixel is one vector of four */
#define FINE_TAPS 12     /* above this many rows per sum, eight bits per weight are too coarse */
#define EOI_WITHIN 1024  /* the end-of-image marker must be within this many bytes of the end */
#define MAX_SIDE 16384
#define TAR_BLOCK 512
#define REDUCE_TO 2

typedef float Floats __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(16)));
typedef uint8_t Bytes __attribute__((vector_size(16)));

typedef struct {
    const uint8_t *data;
    size_t size; /* bytes of data */
    long left, top, width, height; /* the crop, in pixels of the stored image */
    long side; /* side length of the square result */
    int flip;
    uint8_t *out; /* [side, side, 3] */
} Job;

typedef struct {
    struct jpeg_decompress_struct jpeg;
    struct jpeg_error_mgr errors;
    jmp_buf escape;
    void *scratch; /* freed with the decoder */
    char why[64];
} Decoder;

/* For each result along one axis: the first source pixel, and the weights of `taps` consecutive
 * source pixels, which sum to 1. */
typedef struct {
    long taps;
    int32_t *first; /* [results] */
    float *weights; /* [results, taps] */
} Filter;

/* ---- libjpeg error handling ---- */

static void refuse(j_common_ptr jpeg) {
    Decoder *decoder = jpeg->client_data;
    snprintf(decoder->why, sizeof decoder->why, "libjpeg's message %d", jpeg->err->msg_code);
    longjmp(decoder->escape, 1);
}

static void refuse_warning(j_common_ptr jpeg, int level) {
    if (level < 0)
        refuse(jpeg);
}

static void ignore(j_common_ptr jpeg) {
    (void)jpeg;
}

static void fail_with(Decoder *decoder, const char *why) {
    snprintf(decoder->why, sizeof decoder->why, "%s", why);
    longjmp(decoder->escape, 1);
}

/* jpeg_std_error is not used: it writes to stderr and exits the process, and it is the only
 * function that prevents linking libjpeg's static archive into a shared object. */
static void open_decoder(Decoder *decoder, const uint8_t *data, size_t size) {
    memset(&decoder->errors, 0, sizeof decoder->errors);
    decoder->errors.error_exit = refuse;
    decoder->errors.emit_message = refuse_warning;
    decoder->errors.output_message = ignore;
    decoder->errors.reset_error_mgr = ignore;
    decoder->jpeg.err = &decoder->errors;
    decoder->jpeg.client_data = decoder;
    jpeg_create_decompress(&decoder->jpeg);
    if (size == 0)
        fail_with(decoder, "no bytes");
    jpeg_mem_src(&decoder->jpeg, data, (unsigned long)size);
    jpeg_read_header(&decoder->jpeg, TRUE);
}

/* Whether this is a common kind of JPEG: 8 bits, Huffman coding, gray or YCbCr with chroma at
 * full or half resolution. */
static int is_plain(const struct jpeg_decompress_struct *jpeg) {
    const jpeg_component_info *parts = jpeg->comp_info;
    if (jpeg->data_precision != 8 || jpeg->arith_code)
        return 0;
    if (jpeg->num_components == 1)
        return jpeg->jpeg_color_space == JCS_GRAYSCALE;
    if (jpeg->num_components != 3 || jpeg->jpeg_color_space != JCS_YCbCr)
        return 0;
    for (int i = 1; i < 3; i++)
        if (parts[i].h_samp_factor != 1 || parts[i].v_samp_factor != 1)
            return 0;
    return parts[0].h_samp_factor <= 2 && parts[0].v_samp_factor <= 2;
}

/* ---- Resize ---- */

/* The triangle filter of Pillow's BILINEAR. Its width is two source pixels or two result pixels,
 * whichever is larger, and it is truncated at the crop's edge. The crop is [start, start +
 * length) of a row whose pixels low <= i < high are available; `first` counts from low. For a
 * mirrored result, the filters are stored in reverse order. */
static long count_taps(double start, double length, long low, long high, long results) {
    double step = length / results, reach = step > 1 ? step : 1;
    long most = 1;
    for (long i = 0; i < results; i++) {
        double centre = start + (i + 0.5) * step;
        long begin = (long)(centre - reach + 0.5), end = (long)(centre + reach + 0.5);
        begin = begin < low ? low : begin;
        end = end > high ? high : end;
        most = end - begin > most ? end - begin : most;
    }
    return most;
}

static void fill_filter(Filter *filter, double start, double length, long low, long high,
                        long results, int mirror) {
    double step = length / results, reach = step > 1 ? step : 1;
    for (long i = 0; i < results; i++) {
        double centre = start + (i + 0.5) * step, sum = 0;
        long begin = (long)(centre - reach + 0.5), end = (long)(centre + reach + 0.5);
        begin = begin < low ? low : begin;
        end = end > high ? high : end;
        long first = begin + filter->taps > high ? high - filter->taps : begin;
        long place = mirror ? results - 1 - i : i;
        float *weights = filter->weights + place * filter->taps;
        filter->first[place] = (int32_t)(first - low);
        for (int pass = 0; pass < 2; pass++)
            for (long k = 0; k < filter->taps; k++) {
                double away = (first + k - centre + 0.5) / reach;
                double weight =
                    first + k < begin || first + k >= end ? 0 : 1 - (away < 0 ? -away : away);
                weight = weight < 0 ? 0 : weight;
                if (pass == 0)
                    sum += weight;
                else
                    weights[k] = (float)(weight / sum);
            }
    }
}

/* Converts weights to fixed point with a sum of 256; the rounding error is added to the largest. */
static void to_fixed(uint16_t *fixed, const float *weights, long taps) {
    long left = 256, largest = 0;
    for (long k = 0; k < taps; k++) {
        fixed[k] = (uint16_t)(weights[k] * 256 + 0.5f);
        left -= fixed[k];
        largest = weights[k] > weights[largest] ? k : largest;
    }
    fixed[largest] = (uint16_t)(fixed[largest] + left);
}

/* Computes one row of vertical results as the weighted sum of source rows: float [count], in
 * units of 1/256 gray level. */
CLONED static void blend_rows(float *restrict out, uint16_t *restrict sums,
                              const uint8_t *const *rows, const uint16_t *restrict fixed,
                              const float *restrict weights, long taps, long count) {
    if (taps > FINE_TAPS) {
        for (long i = 0; i < count; i++)
            out[i] = 0;
        for (long k = 0; k < taps; k++) {
            const uint8_t *restrict row = rows[k];
            float weight = weights[k] * 256;
            for (long i = 0; i < count; i++)
                out[i] += weight * row[i];
        }
        return;
    }
    const uint8_t *restrict a = rows[0], *restrict b = rows[taps > 1 ? 1 : 0];
    const uint8_t *restrict c = rows[taps > 2 ? 2 : 0];
    uint16_t x = fixed[0], y = taps > 1 ? fixed[1] : 0, z = taps > 2 ? fixed[2] : 0;
    if (taps <= 2)
        for (long i = 0; i < count; i++)
            sums[i] = (uint16_t)(x * a[i] + y * b[i]);
    else
        for (long i = 0; i < count; i++)
            sums[i] = (uint16_t)(x * a[i] + y * b[i] + z * c[i]);
    for (long k = 3; k < taps; k++) {
        const uint8_t *restrict row = rows[k];
        uint16_t weight = fixed[k];
        for (long i = 0; i < count; i++)
            sums[i] = (uint16_t)(sums[i] + weight * row[i]);
    }
    for (long i = 0; i < count; i++)
        out[i] = sums[i];
}

/* Computes one pixel of the result, one byte per channel. */
static inline __attribute__((always_inline)) int32_t sum_pixel(const Floats *pixels,
                                                               const float *weights,
                                                               const long taps) {
    /* the lowest byte of each of four integers */
    const Bytes lowest = {0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12};
    Floats sum = {0.5f, 0.5f, 0.5f, 0.5f};
    for (long k = 0; k < taps; k++)
        sum += pixels[k] * weights[k];
    return ((Ints)__builtin_shuffle((Bytes)__builtin_convertvector(sum, Ints), lowest))[0];
}

static inline __attribute__((always_inline)) void sum_pixels(uint8_t *restrict out,
                                                             const Floats *restrict row,
                                                             const int32_t *restrict first,
                                                             const float *restrict weights,
                                                             const long taps, long side) {
    int32_t pixel;
    for (long i = 0; i < side - 1; i++, out += 3, weights += taps) {
        pixel = sum_pixel(row + first[i], weights, taps);
        memcpy(out, &pixel, 4); /* the fourth byte is overwritten by the next pixel */
    }
    pixel = sum_pixel(row + first[side - 1], weights, taps);
    memcpy(out, &pixel, 3);
}

/* Computes one row of the result: uint8 [side, 3] from float [width] pixels. */
CLONED static void sum_columns(uint8_t *restrict out, const Floats *restrict row,
                               const Filter *restrict filter, long side) {
    switch (filter->taps) {
    case 1: sum_pixels(out, row, filter->first, filter->weights, 1, side); break;
    case 2: sum_pixels(out, row, filter->first, filter->weights, 2, side); break;
    case 3: sum_pixels(out, row, filter->first, filter->weights, 3, side); break;
    case 4: sum_pixels(out, row, filter->first, filter->weights, 4, side); break;
    default: sum_pixels(out, row, filter->first, filter->weights, filter->taps, side);
    }
}

/* ---- Decoding ---- */

/* Chooses the scale, in eighths, at which the crop is decoded. Only scales with fast transforms
 * are used (7, 6, 5 and 3 take longer than 8). The smallest of them is chosen that leaves the
 * crop at least REDUCE_TO times as large as the result, so that the filtered result looks as if
 * it had been decoded at full scale. */
static unsigned choose_eighths(const Job *job) {
    long shorter = job->width < job->height ? job->width : job->height;
    unsigned eighths = 8;
    while (eighths > 1 && shorter * (eighths / 2) / 8 >= REDUCE_TO * job->side)
        eighths /= 2;
    return eighths;
}

static void *take(char **position, size_t bytes) {
    void *taken = *position;
    *position += (bytes + 63) / 64 * 64;
    return taken;
}

/* Whether the data has an end-of-image marker; bytes before the read position were already
 * checked by the reader. */
static int ends_well(const Job *job, struct jpeg_decompress_struct *jpeg) {
    if (jpeg->unread_marker == JPEG_EOI || jpeg_input_complete(jpeg))
        return 1;
    const uint8_t *reader = jpeg->src->next_input_byte;
    const uint8_t *end = job->data + job->size;
    const uint8_t *from = job->size > EOI_WITHIN ? end - EOI_WITHIN : job->data;
    for (const uint8_t *at = end - 2; at >= from && at >= reader; at--)
        if (at[0] == 0xFF && at[1] == JPEG_EOI)
            return 1;
    return 0;
}

static void decode_rows(Decoder *decoder, const Job *job) {
    struct jpeg_decompress_struct *jpeg = &decoder->jpeg;
    if (!is_plain(jpeg))
        fail_with(decoder, "an unsupported kind of JPEG");
    if (job->left + job->width > (long)jpeg->image_width ||
        job->top + job->height > (long)jpeg->image_height)
        fail_with(decoder, "the crop is not inside the image");
    unsigned eighths = choose_eighths(job);
    jpeg->scale_num = eighths;
    jpeg->scale_denom = 8;
    jpeg->out_color_space = JCS_EXT_RGBX;
    jpeg_start_decompress(jpeg); /* reads a progressive file completely */
    if (jpeg->progressive_mode)
        for (int i = 0; i < jpeg->num_components; i++)
            for (int k = 0; k < DCTSIZE2; k++)
                if (jpeg->coef_bits[i][k] != 0)
                    fail_with(decoder, "a progressive JPEG without its last scans");

    /* The crop in pixels of the scaled image, and the range of integer pixels that it touches. */
    double scale = eighths / 8.0;
    double left = job->left * scale, width = job->width * scale;
    double top = job->top * scale, height = job->height * scale;
    long low_x = (long)left, high_x = (long)(left + width + 0.999);
    long low_y = (long)top, high_y = (long)(top + height + 0.999);
    high_x = high_x > (long)jpeg->output_width ? (long)jpeg->output_width : high_x;
    high_y = high_y > (long)jpeg->output_height ? (long)jpeg->output_height : high_y;

    /* Chroma is interpolated from neighboring pixels, which must be part of the decoded region. */
    long margin_left = low_x < 2 ? low_x : 2;
    long margin_right =
        (long)jpeg->output_width - high_x < 2 ? (long)jpeg->output_width - high_x : 2;
    JDIMENSION offset = (JDIMENSION)(low_x - margin_left);
    JDIMENSION columns = (JDIMENSION)(high_x + margin_right - low_x + margin_left);
    /* Moves the offset to the left and widens the range, to full blocks. */
    jpeg_crop_scanline(jpeg, &offset, &columns);
    if (low_y > 0 && jpeg_skip_scanlines(jpeg, (JDIMENSION)low_y) != (JDIMENSION)low_y)
        fail_with(decoder, "rows are missing");

    Filter down = {.taps = count_taps(top, height, low_y, high_y, job->side)};
    Filter across = {.taps = count_taps(left, width, low_x, high_x, job->side)};
    size_t side = (size_t)job->side, count = (size_t)(high_x - low_x) * CHANNELS;
    size_t stride = (size_t)jpeg->output_width * CHANNELS;
    size_t kept = (size_t)down.taps; /* the last source rows, in a ring buffer */
    stride = (stride + 63) / 64 * 64;
    size_t sizes[] = {kept * stride + CHANNELS, kept * sizeof(void *), count * sizeof(float),
                      count * 2,
                      side * sizeof(int32_t), side * kept * sizeof(float), kept * 2,
                      side * sizeof(int32_t), side * (size_t)across.taps * sizeof(float)};
    size_t total = 64;
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        total += (sizes[i] + 63) / 64 * 64;
    decoder->scratch = malloc(total);
    if (!decoder->scratch)
        fail_with(decoder, "no memory");
    char *position = (char *)(((uintptr_t)decoder->scratch + 63) / 64 * 64);
    /* Misaligned on purpose: libjpeg-turbo's writes of aligned rows bypass the caches. */
    uint8_t *ring = (uint8_t *)take(&position, sizes[0]) + CHANNELS;
    const uint8_t **rows = take(&position, sizes[1]);
    float *blended = take(&position, sizes[2]);
    uint16_t *sums = take(&position, sizes[3]);
    down.first = take(&position, sizes[4]);
    down.weights = take(&position, sizes[5]);
    uint16_t *fixed = take(&position, sizes[6]);
    across.first = take(&position, sizes[7]);
    across.weights = take(&position, sizes[8]);

    fill_filter(&down, top, height, low_y, high_y, job->side, 0);
    fill_filter(&across, left, width, low_x, high_x, job->side, job->flip);
    for (size_t i = 0; i < side * (size_t)across.taps; i++)
        across.weights[i] /= 256;
    size_t inset = (size_t)(low_x - (long)offset) * CHANNELS;
    long decoded = 0; /* rows of the crop */
    for (long y = 0; y < job->side; y++) {
        for (; decoded < down.first[y] + down.taps; decoded++) {
            JSAMPROW row = ring + (size_t)(decoded % down.taps) * stride;
            if (jpeg_read_scanlines(jpeg, &row, 1) != 1)
                fail_with(decoder, "rows are missing");
        }
        for (long k = 0; k < down.taps; k++)
            rows[k] = ring + (size_t)((down.first[y] + k) % down.taps) * stride + inset;
        const float *weights = down.weights + y * down.taps;
        to_fixed(fixed, weights, down.taps);
        blend_rows(blended, sums, rows, fixed, weights, down.taps, (long)count);
        sum_columns(job->out + (size_t)y * side * 3, (const Floats *)blended, &across, job->side);
    }
    if (jpeg->output_scanline == jpeg->output_height)
        jpeg_finish_decompress(jpeg); /* reads to the end */
    else if (!ends_well(job, jpeg))
        fail_with(decoder, "no end-of-image marker");
}

/* Fills job->out. Returns 0, or -1 with the reason in `why`; the content of out is then
 * undefined. Does not need the GIL. */
static int run(const Job *job, char *why, size_t length) {
    Decoder decoder;
    memset(&decoder, 0, sizeof decoder);
    int refused = setjmp(decoder.escape);
    if (!refused) {
        open_decoder(&decoder, job->data, job->size);
        decode_rows(&decoder, job);
    }
    jpeg_destroy_decompress(&decoder.jpeg);
    free(decoder.scratch);
    if (refused)
        snprintf(why, length, "%s", decoder.why);
    return refused ? -1 : 0;
}

/* ---- Python module ---- */

static PyObject *header(PyObject *module, PyObject *argument) {
    (void)module;
    Py_buffer encoded;
    if (PyObject_GetBuffer(argument, &encoded, PyBUF_SIMPLE) < 0)
        return NULL;
    Decoder decoder;
    memset(&decoder, 0, sizeof decoder);
    int refused = setjmp(decoder.escape);
    if (!refused)
        open_decoder(&decoder, encoded.buf, (size_t)encoded.len);
    unsigned width = decoder.jpeg.image_width, height = decoder.jpeg.image_height;
    int plain = !refused && is_plain(&decoder.jpeg);
    jpeg_destroy_decompress(&decoder.jpeg);
    PyBuffer_Release(&encoded);
    if (refused)
        Py_RETURN_NONE;
    return Py_BuildValue("(IIO)", width, height, plain ? Py_True : Py_False);
}

static PyObject *decode_crop(PyObject *module, PyObject *arguments) {
    (void)module;
    Py_buffer encoded, out;
    PyObject *target;
    Job job;
    if (!PyArg_ParseTuple(arguments, "y*(llll)Op:decode_crop", &encoded, &job.left, &job.top,
                          &job.width, &job.height, &target, &job.flip))
        return NULL;
    if (PyObject_GetBuffer(target, &out, PyBUF_WRITABLE | PyBUF_C_CONTIGUOUS | PyBUF_FORMAT) < 0) {
        PyBuffer_Release(&encoded);
        return NULL;
    }
    char why[64] = "";
    int failed = -1;
    if (out.ndim != 3 || out.itemsize != 1 || out.shape[0] != out.shape[1] || out.shape[2] != 3 ||
        out.shape[0] < 1 || out.shape[0] > MAX_SIDE)
        snprintf(why, sizeof why, "out is not uint8 [size, size, 3]");
    else if (job.left < 0 || job.top < 0 || job.width < 1 || job.height < 1 || job.left > 65535 ||
             job.top > 65535 || job.width > 65535 || job.height > 65535)
        snprintf(why, sizeof why, "the crop is not inside the image");
    else {
        job.data = encoded.buf;
        job.size = (size_t)encoded.len;
        job.side = (long)out.shape[0];
        job.out = out.buf;
        Py_BEGIN_ALLOW_THREADS
        failed = run(&job, why, sizeof why);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&out);
    PyBuffer_Release(&encoded);
    if (failed) {
        PyErr_SetString(PyExc_ValueError, why);
        return NULL;
    }
    Py_RETURN_NONE;
}

/* Parses a field of octal digits, terminated by a space or a NUL; returns -1 for anything else. */
static long long octal(const uint8_t *field, size_t length) {
    long long value = 0;
    size_t i = 0;
    for (; i < length && field[i] >= '0' && field[i] <= '7'; i++)
        value = value * 8 + (field[i] - '0');
    return i > 0 && i < length && (field[i] == ' ' || field[i] == 0) ? value : -1;
}

/* Returns the length of the name in a header of a plain file (POSIX.1-1988) and sets `size` to
 * the bytes of its content; returns 0 for any other block. */
static size_t plain_file(const uint8_t *block, long long *size) {
    long long sum = 8 * ' ';
    for (size_t i = 0; i < TAR_BLOCK; i++)
        sum += i >= 148 && i < 156 ? 0 : block[i];
    *size = octal(block + 124, 12);
    if (*size < 0 || octal(block + 148, 8) != sum || (block[156] != '0' && block[156] != 0) ||
        block[345] != 0)
        return 0;
    size_t length = 0;
    for (; length < 100 && block[length] != 0; length++)
        if (block[length] >= 0x80)
            return 0;
    return length && block[length - 1] == '/' ? 0 : length;
}

static PyObject *members(PyObject *module, PyObject *argument) {
    (void)module;
    Py_buffer content;
    if (PyObject_GetBuffer(argument, &content, PyBUF_SIMPLE) < 0)
        return NULL;
    PyObject *found = PyList_New(0);
    Py_ssize_t position = 0;
    while (found && position < content.len) {
        const uint8_t *block = (const uint8_t *)content.buf + position;
        Py_ssize_t left = content.len - position - TAR_BLOCK;
        long long size = 0;
        size_t length = left < 0 ? 0 : plain_file(block, &size);
        if (!length || (size + TAR_BLOCK - 1) / TAR_BLOCK * TAR_BLOCK > left) {
            Py_DECREF(found);
            found = Py_NewRef(Py_None);
            break;
        }
        position += TAR_BLOCK;
        PyObject *one = Py_BuildValue("(s#nn)", block, (Py_ssize_t)length, position,
                                      position + (Py_ssize_t)size);
        if (!one || PyList_Append(found, one) < 0)
            Py_CLEAR(found);
        Py_XDECREF(one);
        position += ((Py_ssize_t)size + TAR_BLOCK - 1) / TAR_BLOCK * TAR_BLOCK;
    }
    PyBuffer_Release(&content);
    return found;
}

static PyMethodDef methods[] = {
    {"header", header, METH_O, "See _native.pyi."},
    {"decode_crop", decode_crop, METH_VARARGS, "See _native.pyi."},
    {"members", members, METH_O, "See _native.pyi."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_native", "See _native.pyi.", 0, methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__native(void) {
    return PyModuleDef_Init(&definition);
}
