//! What `--help` says behind the options: what each command does beyond its line, and examples.

pub(super) const EXIT_CODES: &str = "\
Exit codes: 0 done; 1 failed (the store, the image, no room); 2 wrong arguments; 3 the volume is damaged, was tampered with or is
older than its anchor; 4 refused, by the key holder or for want of the right key; 129, 130, 143 ended by SIGHUP, SIGINT, SIGTERM.
After any other code than 0 no volume and no image was made or replaced, unless the line says otherwise.";

pub(super) const EXAMPLES: &str = "\
Examples:
  An empty volume of 20 GiB, for the volume `data` that customer `acme` has registered at the provider:
    fealty-keys volume exec acme data -- fealty-disk create /store/data.vol --size 20G

  A volume from an image, straight out of a pipe:
    zstdcat root.img.zst | fealty-keys volume exec acme root -- fealty-disk import - /store/root.vol --size 8G

  What it holds, decrypted, into another tool:
    fealty-keys volume exec acme root -- fealty-disk export /store/root.vol - | sha256sum

  Is it whole? (Code 3 if not, with a line for each bad range of blocks.)
    fealty-keys volume exec acme root -- fealty-disk check /store/root.vol

  As a disk for programs that speak NBD:
    fealty-keys volume exec acme root -- fealty-disk serve /store/root.vol --nbd /run/root.sock
    fio --ioengine=nbd --uri='nbd+unix:///?socket=/run/root.sock' --name=read --rw=randread --runtime=10 --time_based

  What the operator, who has no key, can see of it:
    fealty-disk info /store/root.vol

Exit codes:
  0    done
  1    failed: the store, the image, no room
  2    wrong arguments
  3    the volume is damaged, was tampered with, or is older than its anchor at the provider
  4    refused: by the key holder, or for want of the right key or a fresh open number
  129, 130, 143  ended by SIGHUP, SIGINT, SIGTERM

After any other code than 0 no volume and no image was made or replaced, unless the line on standard error says otherwise.";

pub(super) const CREATE: &str = "\
The volume appears under its name when it is complete, and is usable once the provider keeps its first anchor, which is the last
thing this does.

Examples: fealty-keys volume exec acme data -- fealty-disk create /store/data.vol --size 20G
          fealty-keys volume exec acme data -- fealty-disk create /store/data.vol --size 20G --room 25%";

pub(super) const IMPORT: &str = "\
The volume appears under its name when it is complete, and is usable once the provider keeps its first anchor, which is the last
thing this does. Until then it is written to .NAME.fealty-partial beside it, which is left there if this is killed (SIGKILL, a power cut):
the next run clears it away.

qcow2 is read by qemu-img, which writes to the volume over a socket that nobody else has: plain text lies in no file on the way.

Examples: fealty-keys volume exec acme root -- fealty-disk import root.img /store/root.vol
          fealty-keys volume exec acme root -- fealty-disk import --format qcow2 root.qcow2 /store/root.vol";

pub(super) const CLONE: &str = "\
The clone has a name and an id at the key provider, and keys, all of its own: every block is read, verified and written anew under them,
which takes as long as reading and writing all data. Neither opens with a key of the other; each can be rekeyed, erased or retired
alone. Snapshots are not copied. The policy must permit volume.clone.

Killed (SIGKILL, a power cut) it leaves .NAME.fealty-partial, which the next run replaces. That one takes the clone's name and id from
the key provider again.

Example: fealty-keys volume exec acme root -- fealty-disk clone /store/root.vol /store/copy.vol --name copy";

pub(super) const EXPORT: &str = "\
The image is the guest's data in plain text, readable by you alone (mode 0600). It appears under its name when it is complete; killed
(SIGKILL, a power cut) this leaves .NAME.fealty-partial, plain text too: remove it. A bad block ends the export: with --salvage it does not,
and what can be read of a damaged volume is saved.

Examples: fealty-keys volume exec acme root -- fealty-disk export /store/root.vol root.img
          fealty-keys volume exec acme root -- fealty-disk export --salvage /store/root.vol root.img";

pub(super) const INFO: &str = "\
Without keys this shows what whoever could write the file wrote there. With keys the volume is opened, and everything shown has been
authenticated.

Examples: fealty-disk info /store/root.vol
          fealty-keys volume exec acme root -- fealty-disk info /store/root.vol";

pub(super) const CHECK: &str = "\
One line for each range of bad blocks (4096 bytes each, as the guest counts them), then a summary. Nothing is changed; each finding
also goes to the customer's audit log.

Example: fealty-keys volume exec acme root -- fealty-disk check /store/root.vol";

pub(super) const SNAPSHOT: &str = "\
What is written over takes up room beyond the volume's size as long as a snapshot holds it: `info` shows how much is left, `resize --room` gives
more. The volume goes back to its newest snapshot only, which the policy must permit (volume.revert). `export --snapshot` and
`clone --snapshot` read one.

Examples: fealty-keys volume exec acme data -- fealty-disk snapshot take /store/data.vol --name before-upgrade
          fealty-keys volume exec acme data -- fealty-disk snapshot list /store/data.vol
          fealty-keys volume exec acme data -- fealty-disk snapshot revert /store/data.vol 1
          fealty-keys volume exec acme data -- fealty-disk snapshot delete /store/data.vol 1";

pub(super) const RESIZE: &str = "\
The volume must not be in use meanwhile, but by `serve --control`, which can make it larger (--served): NBD clients that connect from then
on see the new size, those that are connected keep the old one until they connect again; with vhost-user the next front end sees it, when
the VM is powered on again. A volume of a running fealty VM is made larger by `fealty ctl resize-disk`. Snapshots keep their size and what they hold. The key provider learns the new size.

Make what is in the volume (partitions, file systems) smaller first. Data behind the new end, which a file system leaves there unless it
discarded it (fstrim, blkdiscard), keeps the volume from becoming smaller: it needs --discard-tail, as qemu-img's resize needs
--shrink. What is lost so is gone for good, unless a snapshot has it. A volume is not reverted to a snapshot that is larger.

Snapshots hold what the volume did, so that what is written over it takes up room beyond the volume's size. When that is used up, writes
fail, and at last discards, and nothing that was acknowledged is lost: delete a snapshot, for which there is always room, or give the
volume more with --room. A block device that became longer is used to its end with either option, also with the size that the volume has.

What the volume does not need any more becomes holes of its file (on a block device it is discarded); the file itself stays as long as it
was, for data may lie anywhere in it. `clone` makes one that is as short as it can be.

Examples: fealty-keys volume exec acme data -- fealty-disk resize /store/data.vol --size 40G
          fealty-keys volume exec acme data -- fealty-disk resize /store/data.vol --size 10G --discard-tail
          fealty-keys volume exec acme data -- fealty-disk resize /store/data.vol --room 50%
          fealty-disk resize /store/data.vol --size 40G --served /run/data.control";

pub(super) const REKEY: &str = "\
For when a key may be known, or has sealed enough: the key provider issues a new key, and every block is read and written under it, which
takes as long as reading and writing all data. The policy must permit volume.rekey. Where this is interrupted, the next run goes
on under the same key, and says that it did: then run it once more for a key that is new. Older keys stay as long as snapshots need them,
or blocks that are damaged, which it passes over and counts.

One key seals 1 TiB at most, and the guest gets I/O errors after that; each opening after a crash counts for up to 2 GiB. From 896 GiB on the
audit log says so: rekey then (or `serve --rekey`). Where there is more data than that, the rekey ends when its key has sealed so much,
and the next run goes on under another: run it until it says that it is done.

Example: fealty-keys volume exec acme data -- fealty-disk rekey /store/data.vol";

pub(super) const REWRAP: &str = "\
For when the key-encryption key may be known, the one that the key provider hands out: the volume's keys are wrapped under a new one,
at once, whatever the volume's size. The key provider destroys the one so far when the volume's new anchor says that it is not
needed any more: a backup of the key provider from before opens this volume no more, so take a new one (fealty-keys backup) when this
is done. Who read the volume's keys with it can read on: then `rekey` too. The policy must permit volume.rewrap.
Where this is interrupted, the volume opens as before, or with the new one; the next run goes on.

Example: fealty-keys volume exec acme data -- fealty-disk rewrap /store/data.vol";

pub(super) const ERASE: &str = "\
With the key holder, the key provider first retires the volume's keys, so that no copy of the file can be read either (the policy must permit
volume.erase), then the key slots are destroyed. Without, only this file's slots are, which needs no key. Both need --force.

Examples: fealty-keys volume exec acme data -- fealty-disk erase /store/data.vol --force
          fealty-disk erase /store/data.vol --force";

pub(super) const BENCH: &str = "\
First the ciphers alone, on buffers in the processor's caches, on each path that this processor has: the first is the one that volumes
take. Then a volume that is half full and a plain file, in turn: 1 MiB in order, 4 KiB at random with 1 and with 32 requests in flight
(handed over together as a queue's are, and by 32 threads), written and read, and written with a FLUSH after each 32. Each line has the median, the quartiles, and the ratio to what it is compared
with: by the wall's clock the plain file, by processor time (per core) the ciphers alone, the most that is to be had. The volume is used in
this process: a server adds its own time. Its anchors are kept in memory, so that mode `flush` costs an answer of the key provider's
more for each FLUSH.

In a folder everything lies in files without a name, which are gone when this ends, however it ends.

Examples: fealty-disk bench /store --direct
          fealty-disk bench /dev/vdb --size 4G --direct --force";

pub(super) const SERVE: &str = "\
It says when it is ready, with a line on standard output. The socket is yours alone (mode 0600) and goes when the server goes. On
SIGTERM or SIGINT, or when the key holder leaves, requests that were sent are finished and the volume is closed: its anchor at the
provider is then the newest.

A server that is killed loses nothing that it acknowledged unless the machine crashes too: start it again on the same socket, and clients
that reconnect (QEMU: reconnect=1 of a vhost-user chardev, reconnect-delay of nbd; Cloud Hypervisor by itself, for a minute) go on, and
their next FLUSH covers all of it. It costs each write, or as many as come together, a write of 4 KiB to the volume's log before the answer; with --direct the device is waited for.

The anchor at the key provider tells the newest state from an older copy of the volume, which then does not open. --anchor-mode says how
old a copy, put back while the server does not run, may be to pass all the same: with `flush` it lacks nothing that a FLUSH acknowledged,
with `interval` (the default) at most what was flushed in the last second or, where the provider did not answer, in the last 30; with
`close` it may be from any moment since the server began, if it was killed.

Example: fealty-keys volume exec acme root -- fealty-disk serve /store/root.vol --nbd /run/root.sock
         qemu-img info 'nbd+unix:///?socket=/run/root.sock'

With --rekey the volume is also sealed under a new key, by a thread of the lowest priority, while it is in use. It says when that is done.
Stopped before, even by a power cut, the next `serve --rekey` or `rekey` goes on, and says that it did. The policy must permit volume.rekey.

Another virtual machine monitor must share the guest's memory with this process, which weakens what keeps root on its host out:
  qemu-system-x86_64 -object memory-backend-memfd,id=m,size=1G,share=on -machine q35,memory-backend=m \\
      -chardev socket,id=c,path=/run/root.sock,reconnect=1 -device vhost-user-blk-pci,chardev=c,num-queues=4 ...
  cloud-hypervisor --memory size=1G,shared=on --disk vhost_user=true,socket=/run/root.sock,num_queues=4 ...";
