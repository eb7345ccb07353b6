// Direct file transfers with many requests in flight, through Linux's own asynchronous I/O.
//
// The three system calls are made directly, so neither libaio nor liburing has to be installed.
#include <cerrno>
#include <cstdint>
#include <cstring>

#include <algorithm>
#include <vector>

#if defined(__linux__)
#include <linux/aio_abi.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace rewarm {
namespace {

struct Piece {
    int fd;
    char* buffer;
    int64_t size;
    int64_t offset;
    int64_t submitted;
};

#if defined(__linux__)

struct Queue {
    aio_context_t context = 0;
    int depth = 0;
    std::vector<iocb> blocks;
    std::vector<io_event> events;
    std::vector<size_t> owner;  // piece that a request belongs to
    std::vector<int> idle;
    std::vector<int> ready;  // requests that the kernel has still to be given
    int inflight = 0;
};

struct Failure {
    int64_t error = 0;  // the first, a negative errno
    size_t piece = 0;
    void note(int64_t code, size_t where) {
        if (!error) error = code, piece = where;
    }
};

// Fill one request with the next block of a piece.
void prepare(iocb& block, Piece& piece, int64_t block_size, bool write, int number) {
    const int64_t size = std::min(block_size, piece.size - piece.submitted);
    std::memset(&block, 0, sizeof block);
    block.aio_fildes = uint32_t(piece.fd);
    block.aio_lio_opcode = write ? IOCB_CMD_PWRITE : IOCB_CMD_PREAD;
    block.aio_buf = reinterpret_cast<uint64_t>(piece.buffer + piece.submitted);
    block.aio_nbytes = uint64_t(size);
    block.aio_offset = piece.offset + piece.submitted;
    block.aio_data = uint64_t(number);
    piece.submitted += size;
}

// Give the kernel as many requests as it takes.
void submit(Queue& queue, std::vector<Piece>& pieces, size_t& turn, int64_t block_size, bool write, Failure& failure) {
    auto unfinished = [](const Piece& piece) { return piece.submitted < piece.size; };
    while (!failure.error) {
        if (queue.ready.empty()) {
            if (queue.idle.empty() || !std::any_of(pieces.begin(), pieces.end(), unfinished)) return;
            while (!unfinished(pieces[turn % pieces.size()])) turn++;
            const int number = queue.idle.back();
            queue.idle.pop_back();
            queue.owner[size_t(number)] = turn % pieces.size();
            prepare(queue.blocks[size_t(number)], pieces[turn++ % pieces.size()], block_size, write, number);
            queue.ready.push_back(number);
        }
        const int number = queue.ready.back();
        iocb* block = &queue.blocks[size_t(number)];
        if (syscall(SYS_io_submit, queue.context, 1L, &block) == 1) {
            queue.ready.pop_back();
            queue.inflight++;
        } else if (errno == EAGAIN && queue.inflight > 0) {
            return;  // a completion makes room
        } else if (errno != EINTR) {
            failure.note(-errno, queue.owner[size_t(number)]);
        }
    }
}

// Wait for at least one request. What was cut short goes on where it ended: only then the kernel says why.
void reap(Queue& queue, Failure& failure) {
    constexpr uint64_t sector = 512;
    const long count = syscall(SYS_io_getevents, queue.context, 1L, long(queue.depth), queue.events.data(), nullptr);
    if (count < 0 && errno != EINTR) {
        failure.note(-errno, 0);
        queue.inflight = 0;
    }
    for (long i = 0; i < count; i++) {
        const int number = int(queue.events[size_t(i)].data);
        const int64_t result = queue.events[size_t(i)].res;
        iocb& block = queue.blocks[size_t(number)];
        queue.inflight--;
        const bool part = result > 0 && uint64_t(result) < block.aio_nbytes && uint64_t(result) % sector == 0;
        if (part) {
            block.aio_buf += uint64_t(result);
            block.aio_offset += result;
            block.aio_nbytes -= uint64_t(result);
            queue.ready.push_back(number);
            continue;
        }
        queue.idle.push_back(number);
        if (result < 0) failure.note(result, queue.owner[size_t(number)]);
        else if (uint64_t(result) != block.aio_nbytes) failure.note(-EIO, queue.owner[size_t(number)]);
    }
}

Failure transfer(Queue& queue, bool write, std::vector<Piece>& pieces, int64_t block_size) {
    Failure failure;
    size_t turn = 0;
    for (;;) {
        // Without an error this leaves none in flight only if nothing is left to be done.
        submit(queue, pieces, turn, block_size, write, failure);
        if (queue.inflight == 0) break;
        reap(queue, failure);
    }
    // After an error some were prepared and never submitted.
    queue.idle.insert(queue.idle.end(), queue.ready.begin(), queue.ready.end());
    queue.ready.clear();
    return failure;
}

#endif

}  // namespace
}  // namespace rewarm

extern "C" {

// A queue of `depth` requests, or null with the reason in *error (a negative errno).
void* rewarm_aio_open(int depth, int* error) {
#if defined(__linux__)
    auto* queue = new rewarm::Queue;
    queue->depth = depth;
    queue->blocks.resize(size_t(depth));
    queue->events.resize(size_t(depth));
    queue->owner.resize(size_t(depth));
    for (int i = 0; i < depth; i++) queue->idle.push_back(i);
    if (syscall(SYS_io_setup, depth, &queue->context) == 0) return queue;
    *error = -errno;
    delete queue;
#else
    *error = -ENOSYS;
#endif
    return nullptr;
}

// Read or write `count` pieces, each contiguous in memory and in its file, as blocks taken from the pieces in turn.
// Returns 0 when all is done; or a negative errno, with the index of the piece in *failed, when nothing of it runs any
// more.
int64_t rewarm_aio_transfer(void* opaque, int write, int count, const int* fds, void** buffers, const int64_t* sizes,
                            const int64_t* offsets, int64_t block_size, int* failed) {
#if defined(__linux__)
    std::vector<rewarm::Piece> pieces;
    std::vector<int> numbers;
    for (int i = 0; i < count; i++) {
        if (sizes[i] <= 0) continue;
        pieces.push_back(rewarm::Piece{fds[i], static_cast<char*>(buffers[i]), sizes[i], offsets[i], 0});
        numbers.push_back(i);
    }
    if (pieces.empty()) return 0;
    const auto failure = rewarm::transfer(*static_cast<rewarm::Queue*>(opaque), write != 0, pieces, block_size);
    if (failure.error) *failed = numbers[failure.piece];
    return failure.error;
#else
    return -ENOSYS;
#endif
}

void rewarm_aio_close(void* opaque) {
#if defined(__linux__)
    auto* queue = static_cast<rewarm::Queue*>(opaque);
    syscall(SYS_io_destroy, queue->context);
    delete queue;
#endif
}
}
