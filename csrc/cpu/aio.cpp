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
    std::vector<int> idle;
    std::vector<io_event> events;
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

// Wait for at least one request. Returns 0, or a negative errno if one failed or was cut short.
int64_t reap(Queue& queue) {
    const long count = syscall(SYS_io_getevents, queue.context, 1L, long(queue.depth), queue.events.data(), nullptr);
    if (count < 0) return errno == EINTR ? 0 : -errno;
    int64_t error = 0;
    for (long i = 0; i < count; i++) {
        const int number = int(queue.events[size_t(i)].data);
        const int64_t result = queue.events[size_t(i)].res;
        queue.idle.push_back(number);
        if (result < 0) error = result;
        if (result >= 0 && uint64_t(result) != queue.blocks[size_t(number)].aio_nbytes) error = -EIO;
    }
    return error;
}

int64_t transfer(Queue& queue, bool write, std::vector<Piece>& pieces, int64_t block_size) {
    int64_t error = 0;
    size_t turn = 0;
    auto pending = [&] { return queue.depth - int(queue.idle.size()); };
    auto unfinished = [](const Piece& piece) { return piece.submitted < piece.size; };
    while (pending() > 0 || (!error && std::any_of(pieces.begin(), pieces.end(), unfinished))) {
        while (!error && !queue.idle.empty() && std::any_of(pieces.begin(), pieces.end(), unfinished)) {
            while (!unfinished(pieces[turn % pieces.size()])) turn++;
            const int number = queue.idle.back();
            iocb* block = &queue.blocks[size_t(number)];
            prepare(*block, pieces[turn++ % pieces.size()], block_size, write, number);
            if (syscall(SYS_io_submit, queue.context, 1L, &block) != 1) error = -errno;
            else queue.idle.pop_back();
        }
        if (pending() == 0) break;
        const int64_t failed = reap(queue);
        if (failed && !error) error = failed;
    }
    return error;
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
// Returns 0 when all is done, or a negative errno.
int64_t rewarm_aio_transfer(void* opaque, int write, int count, const int* fds, void** buffers, const int64_t* sizes,
                            const int64_t* offsets, int64_t block_size) {
#if defined(__linux__)
    std::vector<rewarm::Piece> pieces;
    for (int i = 0; i < count; i++)
        if (sizes[i] > 0)
            pieces.push_back(rewarm::Piece{fds[i], static_cast<char*>(buffers[i]), sizes[i], offsets[i], 0});
    return rewarm::transfer(*static_cast<rewarm::Queue*>(opaque), write != 0, pieces, block_size);
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
