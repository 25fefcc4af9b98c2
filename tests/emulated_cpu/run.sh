#!/bin/sh
# Runs tests on an emulated Intel Sapphire Rapids, whose AVX512_BF16, VNNI and AMX few machines have.
#
#   sudo sh tests/emulated_cpu/run.sh FOLDER kernels   tests/sanitize/main.cc in bfloat16 and int8, with AMX and without
#   sudo env PATH="$PATH" sh tests/emulated_cpu/run.sh FOLDER paddle
#                                                      test_products.py and test_precision.py, with AMX and without
#
# FOLDER receives a Debian 13 with the emulator Bochs 3.0 and Linux 6.12, 2 GB, which is kept for the next time, and with
# `paddle` an image of Python's packages, 4 GB more. The host needs debootstrap and a GCC that knows the processor
# (11 or newer), for `paddle` also the Python in which Paddle is installed. `kernels` takes a quarter of an hour,
# `paddle` up to an hour.
#
# Bochs lacks a feature (XFD) without which Linux leaves AMX off: amx_state.c turns it on, and permit_amx.c grants it.
# Linux then does not save the tile registers, so one thread at a time may use them. Bochs 3.0 also takes the signed
# bytes of AMX's int8 products as unsigned: with AMX, `kernels` draws weights from 0 to 127, and `paddle` leaves int8
# out.
set -eu
refuse() {
    echo "$0: $1" >&2
    exit 2
}
[ $# -eq 2 ] || refuse 'expected FOLDER, and kernels or paddle'
folder=$1 what=$2
case $what in kernels | paddle) ;; *) refuse "$what: expected kernels or paddle" ;; esac
[ "$(id -u)" = 0 ] || refuse 'needs root, for debootstrap and chroot'
for tool in debootstrap unshare "${CXX:-g++}"; do
    command -v "$tool" > /dev/null || refuse "$tool is missing"
done
here=$(cd "$(dirname "$0")" && pwd) root=$(cd "$(dirname "$0")/../.." && pwd)
processor=-march=sapphirerapids
without_amx="$processor -mno-amx-tile -mno-amx-bf16 -mno-amx-int8"

# Debian, its kernel and the module
if [ ! -e "$folder/etc/debian_version" ]; then
    debootstrap --variant=minbase trixie "$folder" http://deb.debian.org/debian
fi
folder=$(cd "$folder" && pwd)
if [ ! -e "$folder/emulated/amx_state.ko" ]; then
    chroot "$folder" apt-get install -y -q --no-install-recommends bochs bochs-term bochsbios vgabios busybox-static cpio \
        dosfstools e2fsprogs gcc libc6-dev linux-headers-amd64 linux-image-amd64 make mtools syslinux xz-utils
    mkdir -p "$folder/emulated"
    cp "$here/amx_state.c" "$folder/emulated"
    echo 'obj-m := amx_state.o' > "$folder/emulated/Makefile"
    chroot "$folder" sh -c 'make -C /lib/modules/*/build M=/emulated modules'
fi

# the guest's own files
guest=$folder/emulated/guest
rm -rf "$guest"
mkdir -p "$guest/bin" "$guest/dev" "$guest/proc" "$guest/tmp"
cp "$folder/bin/busybox" "$guest/bin"
for name in sh cat env ls; do
    ln -s busybox "$guest/bin/$name"
done
case $what in
kernels)
    compile() {
        "${CXX:-g++}" -O2 -std=c++17 -fopenmp -ffp-contract=fast -static -w -I "$root/large_kernel/csrc" "$@" \
            "$root/tests/sanitize/main.cc" "$here/permit_amx.c"
    }
    compile $processor -DLK_LEAST_WEIGHT=0 -o "$guest/with_amx"
    compile $without_amx -o "$guest/without_amx"
    printf '%s\n' 'set -x' '/with_amx 4 rounded && /without_amx 4 rounded' > "$guest/run.sh"
    ;;
paddle)
    python=$(command -v python) || refuse 'python is missing'
    "$python" "$here/paddle_guest.py" "$guest" "$processor" "$without_amx"
    gcc -O1 -shared -fPIC "$here/permit_amx.c" -o "$guest/permit_amx.so"
    ;;
esac

# disks and memory of the guest
cp "$here/bochsrc" "$here/init" "$folder/emulated"
unshare --mount sh -c 'mount --bind /proc "$1/proc" && exec chroot "$1" sh -eu' - "$folder" <<'END'  # for syslinux
cd /emulated
rm -rf ram boot.img guest.img *.lock serial.txt
mkdir -p ram/bin ram/dev ram/guest ram/proc
cp init amx_state.ko ram
chmod +x ram/init
cp /bin/busybox ram/bin
modules=$(echo /lib/modules/*/kernel)
for module in drivers/scsi/scsi_common drivers/scsi/scsi_mod drivers/ata/libata drivers/ata/ata_piix \
              drivers/scsi/sd_mod lib/crc16 fs/mbcache fs/jbd2/jbd2 crypto/crc32c_generic fs/ext4/ext4; do
    xz -dc "$modules/$module.ko.xz" > "ram/$(basename $module).ko"
done
(cd ram && find . | cpio -o -H newc --quiet | gzip -1) > initrd.gz
cat > syslinux.cfg <<'CFG'
SERIAL 0 115200
DEFAULT linux
LABEL linux
  KERNEL vmlinuz
  APPEND initrd=initrd.gz console=ttyS0 quiet mitigations=off nokaslr tsc=reliable lpj=1000000 clearcpuid=amx_tile no5lvl nopcid acpi=off
CFG
truncate -s 96M boot.img
mkfs.vfat -F 32 boot.img > /dev/null
mcopy -i boot.img /boot/vmlinuz-* ::vmlinuz
mcopy -i boot.img initrd.gz syslinux.cfg ::
syslinux --install boot.img
size=$(($(du -sm guest | cut -f1) * 5 / 4 + 64))
truncate -s $(((size + 503) / 504 * 504))M guest.img
mke2fs -q -t ext4 -O ^has_journal,^metadata_csum -d guest guest.img
touch serial.txt
END

# until the guest says that it has ended
chroot "$folder" sh -c 'cd /emulated && exec bochs -q -f bochsrc' > "$folder/emulated/bochs.txt" 2>&1 &
emulator=$!
tail -f "$folder/emulated/serial.txt" &
while kill -0 $emulator 2> /dev/null && ! grep -q '^STATUS ' "$folder/emulated/serial.txt"; do
    sleep 5
done
kill $emulator $! 2> /dev/null || true
grep -q '^STATUS 0' "$folder/emulated/serial.txt"
