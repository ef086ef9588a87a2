// Random views of images in one launch: each block draws the parameters of a view and makes it.
//
// The formulas are those of views.py, draws.py and viewkernel.py. Sums are added in a fixed order and there
// are no atomics, so the same arguments give the same bits on the same kind of GPU. No header is needed.
//
// cuda_views.py compiles this file through NVRTC and defines the constants ATTEMPTS, MOST_TAPS, MOST_THREADS,
// LOG_RATIO, LOG_SPAN, SIGMA_LOW, SIGMA_SPAN, RED, GREEN, BLUE and SOLARIZE_FROM, so that each has one source.
// Shapes: B images, V views, S image side.

#ifndef DYNAMIC_SHARED
#define DYNAMIC_SHARED(name) extern __shared__ float name[]
#endif

struct Arguments {
    const unsigned char* images;  // (B, 3, S, S)
    void* out;                    // (V, 3, S, S), or (V, S, S, 3) with `channels_last`; null: parameters only
    const long long* at;          // seed and number of this batch; null: parameters are `given`
    const float* given;           // (V, COLUMNS)
    float* record;                // (V, COLUMNS), the parameters that were used; may be null
    float* scratch;               // (blocks, planes, S, S); null: a view's pixels are in shared memory
    const float* scale;           // (3,), of the normalisation
    const float* shift;           // (3,)
    int image_count;
    int views;
    int firsts;         // second views are those from this number on
    int size;           // S
    int blur_half;      // the blur's kernel has 2 blur_half + 1 taps; 0: no view is blurred
    int bfloat16;       // `out` is bfloat16, else float32
    int channels_last;
    float crop_scale_min;
    float jitter_probability;
    float hue;          // largest shift, in turns
    float flip_probability;
    float grayscale_probability;
    float blur_first, blur_second;          // probabilities in first and in second views
    float solarize_first, solarize_second;
    float brightness_low, contrast_low, saturation_low;
    float brightness_high, contrast_high, saturation_high;
};

// Columns of a view's parameters. ORDER has four: the operations of the colour jitter, first to last.
enum {
    LEFT, TOP, WIDTH, HEIGHT,
    FLIP,
    FACTORS, HUE = FACTORS + 3,
    ORDER,
    GRAYSCALE = ORDER + 4, BLUR, SIGMA, SOLARIZE,
    COLUMNS
};
enum { BRIGHTNESS, CONTRAST, SATURATION, TURN };

// Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): `counter` becomes four
// random words.
__device__ __forceinline__ void philox(unsigned int counter[4], unsigned int key0, unsigned int key1)
{
    for (int round = 0; round < 10; ++round) {
        const unsigned long long even = 0xD2511F53ull * counter[0], odd = 0xCD9E8D57ull * counter[2];
        counter[0] = (unsigned int)(odd >> 32) ^ counter[1] ^ key0;
        counter[1] = (unsigned int)odd;
        counter[2] = (unsigned int)(even >> 32) ^ counter[3] ^ key1;
        counter[3] = (unsigned int)even;
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
}

// Uniform in [0, 1), with 24 bits.
__device__ __forceinline__ float uniform(unsigned int word)
{
    return (float)(word >> 8) * (1.0f / 16777216.0f);
}

// Parameters of view `number` into `row` (COLUMNS,), by the threads of a block. The random words of a view
// depend on seed, batch and number only. Ends with the row complete for all threads.
__device__ __forceinline__ void draw(const Arguments& a, int number, float* row)
{
    __shared__ float boxes[ATTEMPTS][4];  // a width of 0: the crop does not fit
    __shared__ int jittered;
    const unsigned long long seed = (unsigned long long)a.at[0], batch = (unsigned long long)a.at[1];
    const float size = (float)a.size;
    for (int part = threadIdx.x; part < 3 + ATTEMPTS; part += blockDim.x) {
        unsigned int word[4] = {
            (unsigned int)part, (unsigned int)number, (unsigned int)batch, (unsigned int)(batch >> 32)};
        philox(word, (unsigned int)seed, (unsigned int)(seed >> 32));
        const float first = uniform(word[0]), second = uniform(word[1]);
        const float third = uniform(word[2]), fourth = uniform(word[3]);
        if (part == 0) {
            jittered = first < a.jitter_probability;
            row[FACTORS + BRIGHTNESS] = a.brightness_low + second * (a.brightness_high - a.brightness_low);
            row[FACTORS + CONTRAST] = a.contrast_low + third * (a.contrast_high - a.contrast_low);
            row[FACTORS + SATURATION] = a.saturation_low + fourth * (a.saturation_high - a.saturation_low);
        } else if (part == 1) {
            row[HUE] = (2.0f * first - 1.0f) * a.hue;
            row[FLIP] = second < a.flip_probability;
            row[GRAYSCALE] = third < a.grayscale_probability;
            // One of 24 orders: each operation takes one of the places that those before it left.
            unsigned int order = (unsigned int)(((unsigned long long)word[3] * 24) >> 32), taken = 0;
            for (int operation = BRIGHTNESS, left = 4; operation <= TURN; ++operation, --left) {
                int skip = (int)(order % left), place = 0;
                order /= left;
                while (taken >> place & 1 || skip-- > 0) ++place;
                taken |= 1u << place;
                row[ORDER + place] = (float)operation;
            }
        } else if (part == 2) {
            row[BLUR] = first < (number >= a.firsts ? a.blur_second : a.blur_first);
            row[SIGMA] = SIGMA_LOW + second * SIGMA_SPAN;
            row[SOLARIZE] = third < (number >= a.firsts ? a.solarize_second : a.solarize_first);
        } else {
            const float area = size * size * (a.crop_scale_min + first * (1.0f - a.crop_scale_min));
            const float half = expf((LOG_RATIO + second * LOG_SPAN) * 0.5f);
            const float width = rintf(sqrtf(area) * half), height = rintf(sqrtf(area) / half);
            const int fits = 0.0f < width && width <= size && 0.0f < height && height <= size;
            float* box = boxes[part - 3];
            box[0] = fminf(floorf(third * (size - width + 1.0f)), size - width);
            box[1] = fminf(floorf(fourth * (size - height + 1.0f)), size - height);
            box[2] = fits ? width : 0.0f;
            box[3] = height;
        }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        int attempt = 0;
        while (attempt < ATTEMPTS && boxes[attempt][2] == 0.0f) ++attempt;
        const float whole[4] = {0.0f, 0.0f, size, size};
        for (int edge = 0; edge < 4; ++edge)
            row[LEFT + edge] = attempt < ATTEMPTS ? boxes[attempt][edge] : whole[edge];
        if (!jittered) {
            row[FACTORS + BRIGHTNESS] = row[FACTORS + CONTRAST] = row[FACTORS + SATURATION] = 1.0f;
            row[HUE] = 0.0f;
        }
    }
    __syncthreads();
}

// Where the crop of `extent` pixels from `origin` on is sampled for output pixel `place` of `size`.
__device__ __forceinline__ float position(int place, int size, float origin, float extent)
{
    const float at = ((float)place + 0.5f) * (extent / (float)size) - 0.5f;
    return fminf(fmaxf(at, 0.0f), extent - 1.0f) + origin;
}

// Output pixel `index` of the crop of `image` (3, S, S), flipped and resized bilinearly, in [0, 1].
__device__ __forceinline__ void crop(const unsigned char* image, int size, const float* row, int index, float* rgb)
{
    const int y = index / size, x = index - y * size;
    const float across = position(row[FLIP] != 0.0f ? size - 1 - x : x, size, row[LEFT], row[WIDTH]);
    const float down = position(y, size, row[TOP], row[HEIGHT]);
    const int left = (int)across, above = (int)down;
    // The last column and row have no neighbour, and a share of 0 of it.
    const int right = min(left + 1, size - 1), below = min(above + 1, size - 1);
    const float share = across - (float)left, weight = down - (float)above;
    for (int channel = 0; channel < 3; ++channel) {
        const unsigned char *upper = image + (channel * size + above) * size;
        const unsigned char *lower = image + (channel * size + below) * size;
        const float high = (float)upper[left], beside_high = (float)upper[right];
        const float here = high + ((float)lower[left] - high) * weight;
        const float beside = beside_high + ((float)lower[right] - beside_high) * weight;
        rgb[channel] = (here + (beside - here) * share) * (1.0f / 255.0f);
    }
}

__device__ __forceinline__ float luma(const float* rgb)
{
    return rgb[0] * RED + rgb[1] * GREEN + rgb[2] * BLUE;
}

__device__ __forceinline__ float unit(float value)
{
    return fminf(fmaxf(value, 0.0f), 1.0f);
}

// Turn the hue; see color.shift_hue_.
__device__ __forceinline__ void turn(float* rgb, float turns)
{
    const float r = rgb[0], g = rgb[1], b = rgb[2];
    const float high = fmaxf(fmaxf(r, g), b), low = fminf(fminf(r, g), b), chroma = high - low;
    const float scale = 1.0f / fmaxf(chroma, 1e-12f);
    float hue = high == g ? (b - r) * scale + 2.0f : (r - g) * scale + 4.0f;
    hue = (high == r ? (g - b) * scale : hue) + turns * 6.0f;
    hue -= floorf(hue / 6.0f) * 6.0f;
    rgb[0] = low + chroma * unit(fabsf(hue - 3.0f) - 1.0f);
    rgb[1] = low + chroma * unit(2.0f - fabsf(hue - 2.0f));
    rgb[2] = low + chroma * unit(2.0f - fabsf(hue - 4.0f));
}

// Operations `from` to `to` of a view's colour jitter on one pixel; `grey` is the image's mean for contrast.
__device__ __forceinline__ void jitter(const float* row, int from, int to, float grey, float* rgb)
{
    for (int place = from; place < to; ++place) {
        const int operation = (int)row[ORDER + place];
        if (operation == TURN) {
            if (row[HUE] != 0.0f) turn(rgb, row[HUE]);
            continue;
        }
        const float factor = row[FACTORS + operation], rest = 1.0f - factor;
        if (factor == 1.0f) continue;
        const float other = operation == CONTRAST ? rest * grey : operation == SATURATION ? rest * luma(rgb) : 0.0f;
        for (int channel = 0; channel < 3; ++channel) rgb[channel] = unit(rgb[channel] * factor + other);
    }
}

// Grayscale, solarisation and normalisation of pixel `index` of view `number`, and its way out.
__device__ __forceinline__ void finish(const Arguments& a, const float* row, int number, int index, float* rgb)
{
    if (row[GRAYSCALE] != 0.0f) rgb[0] = rgb[1] = rgb[2] = luma(rgb);
    const long long area = a.size * a.size, start = 3 * area * number;
    for (int channel = 0; channel < 3; ++channel) {
        float value = rgb[channel];
        if (row[SOLARIZE] != 0.0f && value >= SOLARIZE_FROM) value = 1.0f - value;
        value = value * a.scale[channel] + a.shift[channel];
        const long long to = start + (a.channels_last ? 3ll * index + channel : channel * area + index);
        if (a.bfloat16) {
            union { float number; unsigned int bits; } as = {value};
            // To the nearest, ties to even. Values are finite.
            as.bits += 0x7fffu + (as.bits >> 16 & 1u);
            ((unsigned short*)a.out)[to] = (unsigned short)(as.bits >> 16);
        } else {
            ((float*)a.out)[to] = value;
        }
    }
}

// Sum of one number of each thread, the same for all. blockDim.x is a power of two.
__device__ __forceinline__ float total(float part)
{
    __shared__ float sums[MOST_THREADS];
    sums[threadIdx.x] = part;
    __syncthreads();
    for (unsigned int half = blockDim.x / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
        __syncthreads();
    }
    return sums[0];
}

// Index of a neighbour, reflected at the edges without repeating them.
__device__ __forceinline__ int reflected(int place, int size)
{
    place = abs(place);
    return place < size ? place : 2 * (size - 1) - place;
}

// Blur the planes (3, S, S) with a Gaussian: down each channel into the plane `spare`, then across back.
__device__ __forceinline__ void blur(const Arguments& a, float sigma, float* pixels, float* spare)
{
    __shared__ float weights[MOST_TAPS];
    const int size = a.size, area = size * size, half = a.blur_half;
    for (int tap = threadIdx.x; tap <= half; tap += blockDim.x) {
        float sum = -1.0f, weight = 0.0f;
        for (int other = 0; other <= half; ++other) {
            const float deviation = (float)other / sigma, value = expf(deviation * deviation * -0.5f);
            sum += 2.0f * value;
            if (other == tap) weight = value;
        }
        weights[tap] = weight / sum;
    }
    __syncthreads();  // weights, and the pixels that other threads wrote
    for (int channel = 0; channel < 3; ++channel) {
        float* plane = pixels + channel * area;
        for (int index = threadIdx.x; index < area; index += blockDim.x) {
            const int y = index / size, x = index - y * size;
            float sum = plane[index] * weights[0];
            for (int tap = 1; tap <= half; ++tap) {
                const float above = plane[reflected(y - tap, size) * size + x];
                sum += (above + plane[reflected(y + tap, size) * size + x]) * weights[tap];
            }
            spare[index] = sum;
        }
        __syncthreads();
        for (int index = threadIdx.x; index < area; index += blockDim.x) {
            const int y = index / size, x = index - y * size;
            const float* line = spare + y * size;
            float sum = line[x] * weights[0];
            for (int tap = 1; tap <= half; ++tap)
                sum += (line[reflected(x - tap, size)] + line[reflected(x + tap, size)]) * weights[tap];
            plane[index] = sum;
        }
        __syncthreads();  // before `spare` is written for the next channel
    }
}

// View `number` with the parameters `row`; `pixels` is room for its planes (3, S, S), with blur for one more.
// A thread has the same pixels in each pass, so that only the blur and the mean need the others'.
__device__ __forceinline__ void make(const Arguments& a, const float* row, int number, float* pixels)
{
    const int area = a.size * a.size;
    const unsigned char* image = a.images + 3ll * area * (number % a.image_count);
    int contrast = 0;  // when its turn is: the mean is of the pixels before it
    while (contrast < 4 && ((int)row[ORDER + contrast] != CONTRAST || row[FACTORS + CONTRAST] == 1.0f)) ++contrast;
    const bool blurs = a.blur_half > 0 && row[BLUR] != 0.0f;
    float rgb[3], grey = 0.0f;
    for (int index = threadIdx.x; index < area; index += blockDim.x) {
        crop(image, a.size, row, index, rgb);
        jitter(row, 0, contrast, 0.0f, rgb);
        if (contrast == 4 && !blurs) {
            finish(a, row, number, index, rgb);
            continue;
        }
        grey += luma(rgb);
        for (int channel = 0; channel < 3; ++channel) pixels[channel * area + index] = rgb[channel];
    }
    if (contrast < 4) {
        grey = total(grey) / (float)area;
        for (int index = threadIdx.x; index < area; index += blockDim.x) {
            for (int channel = 0; channel < 3; ++channel) rgb[channel] = pixels[channel * area + index];
            jitter(row, contrast, 4, grey, rgb);
            if (!blurs) {
                finish(a, row, number, index, rgb);
                continue;
            }
            for (int channel = 0; channel < 3; ++channel) pixels[channel * area + index] = rgb[channel];
        }
    }
    if (!blurs) return;
    blur(a, row[SIGMA], pixels, pixels + 3 * area);
    for (int index = threadIdx.x; index < area; index += blockDim.x) {
        for (int channel = 0; channel < 3; ++channel) rgb[channel] = pixels[channel * area + index];
        finish(a, row, number, index, rgb);
    }
}

extern "C" __global__ void __launch_bounds__(MOST_THREADS) make_views(const Arguments a)
{
    DYNAMIC_SHARED(dynamic);
    __shared__ float row[COLUMNS];
    const long long planes = 3ll * a.size * a.size + (a.blur_half > 0 ? 1ll * a.size * a.size : 0);
    for (int number = blockIdx.x; number < a.views; number += gridDim.x) {
        __syncthreads();  // threads may still read the row of the view before
        if (a.at) {
            draw(a, number, row);
        } else {
            for (int column = threadIdx.x; column < COLUMNS; column += blockDim.x)
                row[column] = a.given[(long long)number * COLUMNS + column];
            __syncthreads();
        }
        if (a.record)
            for (int column = threadIdx.x; column < COLUMNS; column += blockDim.x)
                a.record[(long long)number * COLUMNS + column] = row[column];
        if (!a.out) continue;
        // Two calls, so that the compiler knows in each which kind of memory the pixels are in.
        if (a.scratch)
            make(a, row, number, a.scratch + planes * blockIdx.x);
        else
            make(a, row, number, dynamic);
    }
}
