"""Files of every kind that people have, made with the ffmpeg command, and what ffmpeg and kinoray see in them.

    python tests/zoo.py     # writes the table in docs/decoders.md

Each is named as in that table. tests/test_zoo.py holds that what is written there is so.
"""

import re
import shlex
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from decode_reference import HEIGHT, WIDTH, Collect, with_matrix
from kinoray.config.shared import DecodeConfig
from kinoray.errors import MediaError
from kinoray.video.pyav import PyavVideo

__all__ = ["LIMIT", "PAGE", "ZOO", "Animal", "Seen", "look", "make", "row"]

PAGE = Path(__file__).resolve().parents[1] / "docs" / "decoders.md"
LIMIT = 0.5
"""Grey levels, in the mean over a picture, by which first, middle and last frame may differ from ffmpeg's. Another
frame of these videos differs by 5 and more."""

_PICTURES = "testsrc2=size={size}:rate={rate}:duration={seconds},format=yuv444p,gblur=sigma=8:planes=6"
_X264 = "-c:v libx264 -preset veryfast -threads 1"
_X265 = "-c:v libx265 -preset ultrafast -x265-params log-level=none:pools=none:frame-threads=1:open-gop=0:keyint=12"
_VP8 = "-c:v libvpx -deadline realtime -cpu-used 8 -b:v 300k -g 12"
_VP9 = "-c:v libvpx-vp9 -deadline realtime -cpu-used 8 -b:v 300k -g 12"
_AV1 = "-c:v libaom-av1 -usage realtime -cpu-used 8 -b:v 300k -g 12"
_SOUND = "-f lavfi -i sine=duration=1.5 -c:a {codec} -shortest"
_VARIABLE = "-vf select='not(mod(n\\,7))+mod(n\\,3)*not(between(n\\,15\\,19))' -fps_mode vfr"


@dataclass(frozen=True, kw_only=True, slots=True)
class Animal:
    """How one file is made."""

    ending: str
    options: str
    """Of ffmpeg; the pictures come first."""
    size: str = "128x96"
    rate: str = "25"
    seconds: str = "1.6"
    copied: str | None = None
    """Options of a second command, which copies the packets of the first."""
    begin_s: float = 0.0
    """Where the copy begins."""
    matrix: tuple[int, int, int, int] | None = None
    """(a, b, c, d) of the display matrix."""


ZOO: dict[str, Animal] = {
    # containers, with what is usual in them
    "MP4, H.264": Animal(ending="mp4", options=_X264),
    "MP4, H.264, index at the front": Animal(ending="mp4", options=f"{_X264} -movflags +faststart"),
    "MP4, H.264, in fragments": Animal(ending="mp4", options=f"{_X264} -g 12 -movflags frag_keyframe+empty_moov"),
    "MP4, H.264, as for DASH": Animal(ending="mp4", options=f"{_X264} -g 12 -movflags dash+frag_keyframe+global_sidx"),
    "MP4, H.264 and AAC": Animal(ending="mp4", options=f"{_SOUND.format(codec='aac')} {_X264}"),
    "MP4, H.264, no B-frames": Animal(ending="mp4", options=f"{_X264} -bf 0 -g 250"),
    "MP4, H.264, open groups": Animal(ending="mp4", options=f"{_X264} -g 12 -x264-params open-gop=1:bframes=3"),
    "MP4, H.264, every frame a key frame": Animal(ending="mp4", options=f"{_X264} -g 1"),
    "MP4, H.264, lossless 4:4:4": Animal(ending="mp4", options=f"{_X264} -qp 0 -pix_fmt yuv444p"),
    "MP4, H.264, 10 bit": Animal(ending="mp4", options=f"{_X264} -pix_fmt yuv420p10le"),
    "MP4, H.264, full range": Animal(ending="mp4", options=f"{_X264} -pix_fmt yuvj420p"),
    "MP4, H.264, odd size": Animal(ending="mp4", options=f"{_X264} -pix_fmt yuv444p", size="127x95"),
    "MP4, HEVC": Animal(ending="mp4", options=f"{_X265} -tag:v hvc1"),
    "MP4, HEVC, 10 bit": Animal(ending="mp4", options=f"{_X265} -pix_fmt yuv420p10le"),
    "MP4, HEVC, open groups": Animal(ending="mp4", options=_X265.replace("open-gop=0", "open-gop=1:bframes=4")),
    "MP4, AV1": Animal(ending="mp4", options=_AV1),
    "MP4, VP9": Animal(ending="mp4", options=_VP9),
    "MP4, MPEG-4 part 2": Animal(ending="mp4", options="-c:v mpeg4 -q:v 4 -bf 2"),
    "MP4, MPEG-2": Animal(ending="mp4", options="-c:v mpeg2video -q:v 4"),
    "QuickTime, ProRes": Animal(ending="mov", options="-c:v prores_ks -profile:v 2 -threads 1"),
    "QuickTime, ProRes 4444": Animal(ending="mov", options="-c:v prores_ks -profile:v 4 -pix_fmt yuva444p10le"),
    "QuickTime, Motion JPEG": Animal(ending="mov", options="-c:v mjpeg -q:v 4 -pix_fmt yuvj420p"),
    "QuickTime, DNxHD": Animal(ending="mov", options="-c:v dnxhd -profile:v dnxhr_sq -pix_fmt yuv422p", size="256x144"),
    "QuickTime, PNG": Animal(ending="mov", options="-c:v png"),
    "QuickTime, Animation": Animal(ending="mov", options="-c:v qtrle"),
    "QuickTime, Cinepak": Animal(ending="mov", options="-c:v cinepak", seconds="0.8"),
    "3GP, H.263": Animal(ending="3gp", options="-c:v h263 -q:v 4", size="176x144"),
    "3GP2, MPEG-4 part 2": Animal(ending="3g2", options="-c:v mpeg4 -q:v 4"),
    "Matroska, H.264": Animal(ending="mkv", options=f"{_X264} -g 12"),
    "Matroska, HEVC": Animal(ending="mkv", options=_X265),
    "Matroska, FFV1": Animal(ending="mkv", options="-c:v ffv1 -level 3 -g 1"),
    "Matroska, HuffYUV": Animal(ending="mkv", options="-c:v huffyuv -pix_fmt yuv422p"),
    "Matroska, raw": Animal(ending="mkv", options="-c:v rawvideo -pix_fmt yuv420p"),
    "Matroska, Theora": Animal(ending="mkv", options="-c:v libtheora -q:v 6"),
    "WebM, VP8": Animal(ending="webm", options=_VP8),
    "WebM, VP8 with hidden frames": Animal(
        ending="webm", options="-c:v libvpx -auto-alt-ref 1 -lag-in-frames 16 -b:v 100k -g 60", seconds="3"
    ),
    "WebM, VP9": Animal(ending="webm", options=_VP9),
    "WebM, VP9 with hidden frames": Animal(
        ending="webm", options="-c:v libvpx-vp9 -cpu-used 5 -auto-alt-ref 1 -lag-in-frames 16 -b:v 100k", seconds="3"
    ),
    "WebM, VP9 and Opus": Animal(ending="webm", options=f"{_SOUND.format(codec='libopus')} {_VP9}"),
    "WebM, AV1": Animal(ending="webm", options=_AV1),
    "AVI, MPEG-4 part 2": Animal(ending="avi", options="-c:v mpeg4 -q:v 4 -vtag DIVX"),
    "AVI, MPEG-4 part 2, B-frames": Animal(ending="avi", options="-c:v mpeg4 -q:v 4 -bf 2 -vtag XVID"),
    "AVI, H.264": Animal(ending="avi", options=f"{_X264} -g 12"),
    "AVI, Motion JPEG and PCM": Animal(
        ending="avi", options=f"{_SOUND.format(codec='pcm_s16le')} -c:v mjpeg -q:v 4 -pix_fmt yuvj422p"
    ),
    "AVI, raw": Animal(ending="avi", options="-c:v rawvideo -pix_fmt bgr24"),
    "AVI, MS MPEG-4": Animal(ending="avi", options="-c:v msmpeg4v2 -q:v 4"),
    "AVI, DV": Animal(ending="avi", options="-c:v dvvideo -pix_fmt yuv420p", size="720x576", seconds="0.4"),
    "MPEG-TS, H.264": Animal(ending="ts", options=f"{_X264} -g 12"),
    "MPEG-TS, HEVC": Animal(ending="ts", options=_X265),
    "MPEG-TS, MPEG-2": Animal(ending="ts", options="-c:v mpeg2video -q:v 4 -bf 2"),
    "MPEG-TS with time codes (M2TS), H.264": Animal(ending="m2ts", options=f"{_X264} -g 12 -mpegts_m2ts_mode 1"),
    "MPEG-PS, MPEG-1": Animal(ending="mpg", options="-c:v mpeg1video -q:v 4 -bf 2"),
    "MPEG-PS (VOB), MPEG-2": Animal(ending="vob", options="-c:v mpeg2video -q:v 4 -bf 2"),
    "FLV, H.264": Animal(ending="flv", options=f"{_X264} -g 12"),
    "FLV, Sorenson": Animal(ending="flv", options="-c:v flv -q:v 4"),
    "Ogg, Theora": Animal(ending="ogv", options="-c:v libtheora -q:v 6"),
    "Ogg, Theora and Vorbis": Animal(ending="ogv", options=f"{_SOUND.format(codec='libvorbis')} -c:v libtheora -q:v 6"),
    "ASF, WMV 2": Animal(ending="wmv", options="-c:v wmv2 -q:v 4"),
    "ASF, WMV 1": Animal(ending="asf", options="-c:v wmv1 -q:v 4"),
    # decided one by one
    "DV, PAL": Animal(ending="dv", options="-c:v dvvideo -pix_fmt yuv420p", size="720x576", seconds="0.4"),
    "DV, NTSC": Animal(
        ending="dv", options="-c:v dvvideo -pix_fmt yuv411p", size="720x480", rate="30000/1001", seconds="0.4"
    ),
    "MXF, MPEG-2": Animal(ending="mxf", options="-c:v mpeg2video -q:v 4 -bf 2"),
    "MXF, DNxHD": Animal(ending="mxf", options="-c:v dnxhd -profile:v dnxhr_sq -pix_fmt yuv422p", size="256x144"),
    "MXF, H.264": Animal(ending="mxf", options=f"{_X264} -g 12"),
    "IVF, VP8": Animal(ending="ivf", options=_VP8),
    "IVF, VP9": Animal(ending="ivf", options=_VP9),
    "IVF, AV1": Animal(ending="ivf", options=_AV1),
    "NUT, H.264": Animal(ending="nut", options=f"{_X264} -g 12"),
    "NUT, MPEG-4 part 2": Animal(ending="nut", options="-c:v mpeg4 -q:v 4 -bf 2"),
    "raw H.264": Animal(ending="h264", options=f"{_X264} -g 12"),
    "raw H.264, no B-frames": Animal(ending="264", options=f"{_X264} -bf 0"),
    "raw HEVC": Animal(ending="hevc", options=_X265),
    "raw HEVC, open groups": Animal(ending="265", options=_X265.replace("open-gop=0", "open-gop=1:bframes=4")),
    "raw MPEG-2": Animal(ending="m2v", options="-c:v mpeg2video -q:v 4 -bf 2"),
    "raw MPEG-1": Animal(ending="mpv", options="-f mpeg1video -c:v mpeg1video -q:v 4"),
    "raw MPEG-4 part 2": Animal(ending="m4v", options="-f m4v -c:v mpeg4 -q:v 4 -bf 2"),
    "raw AV1": Animal(ending="obu", options=_AV1),
    "GIF": Animal(ending="gif", options="", rate="10"),
    "GIF, variable rate": Animal(ending="gif", options=_VARIABLE, rate="10", seconds="3"),
    "animated PNG": Animal(ending="apng", options="-plays 0", rate="10"),
    "animated WebP": Animal(ending="webp", options="-c:v libwebp_anim -loop 0", rate="10"),
    "RealMedia": Animal(ending="rm", options="-c:v rv20 -q:v 4", size="176x144"),
    "YUV4MPEG": Animal(ending="y4m", options=""),
    # rates
    "MP4, H.264, variable rate": Animal(ending="mp4", options=f"{_VARIABLE} {_X264} -g 12"),
    "Matroska, H.264, variable rate": Animal(ending="mkv", options=f"{_VARIABLE} {_X264} -g 12"),
    "WebM, VP9, variable rate": Animal(ending="webm", options=f"{_VARIABLE} {_VP9}"),
    "ASF, WMV 2, variable rate": Animal(ending="wmv", options=f"{_VARIABLE} -c:v wmv2 -q:v 4"),
    "MP4, H.264, 23.976": Animal(ending="mp4", options=_X264, rate="24000/1001"),
    "MPEG-TS, H.264, 29.97": Animal(ending="ts", options=_X264, rate="30000/1001"),
    "MP4, H.264, 120": Animal(ending="mp4", options=_X264, rate="120", seconds="0.5"),
    "MP4, H.264, 1": Animal(ending="mp4", options=_X264, rate="1", seconds="8"),
    "AVI, MPEG-4 part 2, 12.5": Animal(ending="avi", options="-c:v mpeg4 -q:v 4", rate="25/2"),
    "MP4, H.264, one frame": Animal(ending="mp4", options=f"{_X264} -frames:v 1"),
    # fields
    "MP4, H.264, fields, top first": Animal(
        ending="mp4", options=f"-vf tinterlace=4 {_X264} -flags +ilme+ildct -x264-params tff=1", rate="50"
    ),
    "MPEG-TS, H.264, fields, bottom first": Animal(
        ending="ts", options=f"-vf tinterlace=5 {_X264} -flags +ilme+ildct -x264-params bff=1", rate="50"
    ),
    "MPEG-PS, MPEG-2, fields": Animal(
        ending="mpg", options="-vf tinterlace=4 -c:v mpeg2video -q:v 4 -flags +ilme+ildct", rate="50"
    ),
    "MPEG-TS, MPEG-2, 3:2 pulldown": Animal(
        ending="ts", options="-vf telecine -c:v mpeg2video -q:v 4 -flags +ilme+ildct", rate="24"
    ),
    # shapes
    "MP4, H.264, pixels 64:45": Animal(ending="mp4", options=f"-vf setsar=64/45 {_X264}"),
    "Matroska, H.264, pixels 8:9": Animal(ending="mkv", options=f"-vf setsar=8/9 {_X264}"),
    "MPEG-PS, MPEG-2, 16:9": Animal(ending="mpg", options="-aspect 16:9 -c:v mpeg2video -q:v 4"),
    "QuickTime, turned by 90": Animal(ending="mov", options=_X264, matrix=(0, 1, -1, 0)),
    "MP4, turned by 180": Animal(ending="mp4", options=_X264, matrix=(-1, 0, 0, -1)),
    "MP4, HEVC, turned by 270": Animal(ending="mp4", options=_X265, matrix=(0, -1, 1, 0)),
    "MP4, mirrored left to right": Animal(ending="mp4", options=_X264, matrix=(-1, 0, 0, 1)),
    "QuickTime, mirrored top to bottom": Animal(ending="mov", options=_X264, matrix=(1, 0, 0, -1)),
    "MP4, transposed": Animal(ending="mp4", options=_X264, matrix=(0, 1, 1, 0)),
    "3GP, H.264, transposed the other way": Animal(ending="3gp", options=_X264, matrix=(0, -1, -1, 0)),
    # edits and times
    "MP4, H.264, cut without encoding: an edit list hides frames": Animal(
        ending="mp4", options=f"{_X264} -g 12", copied="", begin_s=0.7
    ),
    "QuickTime, H.264, cut without encoding": Animal(ending="mov", options=f"{_X264} -g 20", copied="", begin_s=0.5),
    "Matroska, H.264, cut without encoding": Animal(ending="mkv", options=f"{_X264} -g 12", copied="", begin_s=0.7),
    "MP4, H.264, starts at 10 s": Animal(ending="mp4", options=f"{_X264} -g 12", copied="-output_ts_offset 10"),
    "Matroska, H.264, starts at 10 s": Animal(ending="mkv", options=f"{_X264} -g 12", copied="-output_ts_offset 10"),
    "MPEG-TS, H.264, starts at 1000 s": Animal(ending="ts", options=f"{_X264} -g 12 -output_ts_offset 1000"),
    "MP4, H.264, times before 0": Animal(
        ending="mp4",
        options=f"{_X264} -g 12 -movflags negative_cts_offsets",
        copied="-avoid_negative_ts disabled",
    ),
    "MPEG-TS, H.264, cut in its middle": Animal(ending="ts", options=f"{_X264} -g 12", copied="", begin_s=0.7),
    # several streams
    "MP4, H.264, AAC and a subtitle": Animal(
        ending="mp4",
        options=f"-f lavfi -i sine=duration=1.5 -i {{srt}} -map 0 -map 1 -map 2 -c:a aac -c:s mov_text {_X264}",
    ),
    "MP4, a large video and a small one": Animal(
        ending="mp4", options=f"-map 0:v -map 0:v -filter:v:1 scale=64:48 {_X264} -g 12"
    ),
    "Matroska, two sounds and a subtitle": Animal(
        ending="mkv",
        options=f"-f lavfi -i sine=duration=1.5 -i {{srt}} -map 1:a -map 1:a -map 0:v -map 2 -c:a libvorbis {_X264}",
    ),
    "MP4, H.264 and a cover": Animal(
        ending="mp4",
        options=f"-f lavfi -i color=red:size=512x512:duration=0.1 -map 0 -map 1 {_X264} -frames:v:1 1 -c:v:1 png "
        "-disposition:v:1 attached_pic",
    ),
    "MPEG-TS, H.264 and MP2": Animal(ending="ts", options=f"{_SOUND.format(codec='mp2')} {_X264} -g 12"),
}


@dataclass(frozen=True, slots=True)
class Seen:
    """What comes of a file."""

    num_frames: int
    """By ffmpeg."""
    found: int | str
    """Frames by kinoray, or the name of its refusal."""
    difference: float = 0.0
    """In grey levels, the largest of first, middle and last frame."""


def make(animal: Animal, folder: Path) -> Path:
    """The file, made in the folder.

    Raises:
        CalledProcessError: ffmpeg does not make it.
    """
    subtitle = folder / "a.srt"
    subtitle.write_text("1\n00:00:00,100 --> 00:00:01,000\nhello\n")
    made = folder / f"made.{animal.ending}"
    source = _PICTURES.format(size=animal.size, rate=animal.rate, seconds=animal.seconds)
    _ffmpeg("-f", "lavfi", "-i", source, *shlex.split(animal.options.format(srt=subtitle)), str(made))
    if animal.copied is not None:
        copied = folder / f"copied.{animal.ending}"
        seek = ("-ss", str(animal.begin_s)) if animal.begin_s else ()
        _ffmpeg(*seek, "-i", str(made), "-c", "copy", *shlex.split(animal.copied), str(copied))
        return copied
    if animal.matrix is not None:
        made.write_bytes(with_matrix(made.read_bytes(), animal.matrix))
    return made


def look(path: Path) -> Seen:
    """How many frames there are, and how far first, middle and last one are from ffmpeg's."""
    theirs = _frames(path, "0")
    data = path.read_bytes()
    try:
        with PyavVideo(data, DecodeConfig()) as video:
            promised = video.num_frames
            sink = Collect()
            video.read(np.unique([0, promised // 2, promised - 1]), sink)
            num_frames = video.num_frames
    except MediaError as error:
        return Seen(len(theirs), type(error).__name__)
    if num_frames != len(theirs):
        return Seen(len(theirs), num_frames)
    # ffmpeg's scaler is told where chroma lies: at the left, or in the middle (MPEG-1, VP8, JPEG)
    differences = [_difference(sink, theirs)]
    if differences[0] > LIMIT:
        differences.append(_difference(sink, _frames(path, "-513")))
    return Seen(len(theirs), num_frames, min(differences))


def _difference(sink: Collect, theirs: np.ndarray) -> float:
    return max(float(np.abs(frame.astype(int) - theirs[index]).mean()) for index, frame in sink.frames.items())


def _frames(path: Path, chroma: str) -> np.ndarray:
    """uint8 [N, 3, HEIGHT, WIDTH], RGB: every frame that ffmpeg shows of the stream that it shows."""
    scale = f"scale={WIDTH}:{HEIGHT}:flags=bilinear+accurate_rnd:in_h_chr_pos={chroma}:interl=-1,format=gbrp"
    output = _ffmpeg("-i", str(path), "-fps_mode", "passthrough", "-vf", scale, "-f", "rawvideo", "-", check=False)
    return np.frombuffer(output, np.uint8).reshape(-1, 3, HEIGHT, WIDTH)[:, [2, 0, 1]]


def _ffmpeg(*arguments: str, check: bool = True) -> bytes:
    command = ["ffmpeg", "-nostdin", "-v", "error", "-y", *arguments]
    return subprocess.run(command, capture_output=True, check=check, timeout=120).stdout


def row(name: str, seen: Seen) -> str:
    """A line of the table."""
    if isinstance(seen.found, str):
        return f"| {name} | `{seen.found}` | |"
    count = str(seen.found) if seen.found == seen.num_frames else f"{seen.found}, ffmpeg {seen.num_frames}"
    return f"| {name} | {count} | {seen.difference:.1f} |"


def main() -> None:
    """Write the table."""
    rows = ["| file | frames | grey levels off |", "|---|---|---|"]
    for name, animal in ZOO.items():
        with tempfile.TemporaryDirectory() as folder:
            rows.append(row(name, look(make(animal, Path(folder)))))
        print(rows[-1], flush=True)
    page = PAGE.read_text(encoding="ascii")
    before, table = re.split(r"(?=\| file \| frames \|)", page)
    PAGE.write_text(before + "\n".join(rows) + "\n\n" + table.partition("\n\n")[2], encoding="ascii")


if __name__ == "__main__":
    main()
